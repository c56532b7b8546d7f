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
import json, os, sys

import diffusers
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
for line in jobs:
    if not (child := os.fork()):
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
else:
    sys.exit()

job = json.loads(line)
for number, stream in enumerate(("stdin", "stdout", "stderr")):
    os.dup2(os.open(job[stream], os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
os.chdir(job["cwd"])
sys.argv = ["-c", *job["arguments"]]
exec(job["script"], {"__name__": "__main__"})
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
