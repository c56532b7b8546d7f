"""Rules of the house: imports go down only, rooms stay small, and nothing heavy loads before it is needed."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bkd.cli.app import app
from bkd.cli.bench import bench
from bkd.cli.data import data

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "bkd").rglob("*.py"))

LAYERS = [
    {"bkd", "errors", "environment", "files", "progress", "fresh_process"},
    {
        "diffusion.terms",
        "diffusion.noise_schedule",
        "diffusion.grid",
        "diffusion.halving",
        "losses",
        "hooks",
        "rng",
        "surgery",
        "training.live_bytes",
    },
    {"diffusion", "models", "data", "recipe"},
    {"methods"},
    {"card.files", "runs.folder", "runs.lock", "runs.measuring", "output_folder", "pruning", "lora"},
    {"training", "eval", "pregenerate", "edit_plan", "edit"},
    {"runs", "bench", "export"},
    {"report"},
    {"card", "hub"},
    {"cli", "__main__"},
]
"""From the ground up; a module may import from its own layer and from those before it."""


def layer(module):
    name = module.removeprefix("bkd.")
    for number, members in enumerate(LAYERS):
        if any(name == member or name.startswith(member + ".") for member in members):
            return number
    return pytest.fail(f"{module} belongs to no layer")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bkd":
            yield from (f"{node.module}.{a.name}" for a in node.names) if node.module == "bkd" else (node.module,)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "bkd")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    tree = ast.parse(path.read_text())
    here = layer(module_name(path))
    for imported in imports(tree):
        if not imported.endswith("__version__"):
            assert layer(imported) <= here, f"{module_name(path)} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 330
    assert path.stem not in {"utils", "util", "misc", "common", "helpers"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize(
    "verb",
    [*app.registered_commands, *data.registered_commands, *bench.registered_commands],
    ids=lambda verb: verb.callback.__name__,
)
def test_verbs_only_hand_on(verb):
    (function,) = ast.parse(inspect.getsource(verb.callback)).body
    statements = [node for part in function.body[1:] for node in ast.walk(part) if isinstance(node, ast.stmt)]
    assert sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in statements) <= 12


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints(path):
    if "cli" not in path.parts:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def test_help_does_not_load_torch():
    script = "import sys, bkd, bkd.cli.app; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "shapes", "--dry-run", "--blocks", "foo"),
        ("prune", "shapes", "--dry-run", "--blocks", "mid", "-o", str(ROOT)),
        ("prune", "no/such/model", "--blocks", "mid", "--dry-run"),
        ("eval", "shapes", "/no/such/folder"),
        ("eval", "shapes", "--teacher", "model.ckpt"),
        ("sample", str(ROOT), "-o", "pictures", "--prompt", "a"),
        ("sample", "shapes", "-o", "pictures", "--prompt", "a", "--scheduler", "foo"),
        ("sample", "shapes", "-o", str(ROOT), "--prompt", "a"),
        ("edit", "no.png", "--encoder", "shapes", "--from", "a", "--to", "b", "-o", "edited.png"),
        ("bench", "speed", "shapez"),
        ("data", "generate", "shapez", "--prompts", "prompts.txt", "-o", "drawn"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_heavy_loads(command):
    script = f"""
import sys
from bkd.cli.app import app
from bkd.errors import BkdError
try:
    app({list(command)}, standalone_mode=False)
except BkdError:
    sys.exit("torch" in sys.modules or "diffusers" in sys.modules)
sys.exit("not refused")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(("columns", "width"), [("90", 90), ("abc", 120), ("", 120)])
def test_tables_in_a_pipe_heed_columns_where_it_is_a_number(columns, width):
    script = "from bkd.cli.console import console; print(console.width)"
    environment = {**os.environ, "COLUMNS": columns}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == width
