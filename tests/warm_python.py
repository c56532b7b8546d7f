"""Scripts in forks of a process that holds diffusers and never held `bkd`; a new one would import for ten seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, traceback

import diffusers
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

def run(job):
    for stream, mode, number in (("stdin", "r", 0), ("stdout", "w", 1), ("stderr", "w", 2)):
        os.dup2(os.open(job[stream], os.O_RDONLY if mode == "r" else os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, stream, open(number, mode, closefd=False))
    os.chdir(job["cwd"])
    sys.argv = ["-c", *job["arguments"]]
    code = 0
    try:
        exec(compile(job["script"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        if stop.code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
for line in jobs:
    child = os.fork() or run(json.loads(line))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
"""


class WarmPython:
    """Stands for the `subprocess` module where a script without `bkd` is run to its end; closed by its `close`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, command: list[Any], *, cwd: str, input: str, capture_output: bool, text: bool, check: bool
    ) -> subprocess.CompletedProcess[str]:
        """Fork and execute `[sys.executable, "-c", script, argument…]`."""
        python, option, script, *arguments = map(str, command)
        assert (python, option, capture_output, text, check) == (sys.executable, "-c", True, True, False)
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
            )
        with tempfile.TemporaryDirectory() as scratch:
            streams = {name: str(Path(scratch) / name) for name in ("stdin", "stdout", "stderr")}
            Path(streams["stdin"]).write_text(input)
            job = {"script": script, "arguments": arguments, "cwd": os.fspath(cwd), **streams}
            assert self._server.stdin is not None and self._server.stdout is not None
            print(json.dumps(job), file=self._server.stdin, flush=True)
            code = int(self._server.stdout.readline())
            printed = {name: Path(streams[name]).read_text() for name in ("stdout", "stderr")}
        return subprocess.CompletedProcess(command, code, **printed)

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.communicate()
