"""House rules a machine can check: who imports whom, what stays small, what loads lazily, what tools accept."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hadal"
GROUND = {"config", "device", "quant", "text"}
# Room -> the rooms it may import. `kernels` and `model` never learn official tensor names, `engine` never sees text.
MAY_IMPORT = {
    "config": set(),
    "device": set(),
    "text": set(),
    "quant": set(),
    "plan": {"config"},
    "accounts": {"plan"},
    "kernels": GROUND,
    "model": GROUND | {"kernels"},
    "checkpoint": GROUND | {"kernels", "model", "plan"},
    "engine": GROUND - {"text"} | {"kernels", "model"},
    "llm": GROUND | {"checkpoint", "engine", "kernels"},
    "server": GROUND | {"accounts", "llm", "engine", "plan", "checkpoint"},
    "train": GROUND | {"kernels", "model", "checkpoint", "plan"},
    "verify": GROUND | {"kernels", "model", "checkpoint", "plan"},
    "bench": GROUND | {"kernels", "model", "plan", "engine"},
    "terminal": set(),
    "cli": {"*"},
    "__init__": {"*"},
}
NO_TORCH = ("config", "text", "plan", "accounts")
LONGEST_FILE = 400


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Dotted names a module imports anywhere, also inside functions and under TYPE_CHECKING."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{a.name}" if node.module == "hadal" else node.module for a in node.names]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room; say in MAY_IMPORT what it may import"
    allowed = MAY_IMPORT[room] | {room}
    for name in imported(path):
        if name.startswith("hadal.") and "*" not in allowed:
            assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


def test_no_relative_imports_and_no_module_named_utils() -> None:
    for path in modules():
        assert path.stem != "utils"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_files_stay_readable() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text("utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long


def test_only_device_names_an_accelerator() -> None:
    pattern = re.compile(r"""["'(= ](cuda|npu|xpu|mps|hip)[":'.]|torch\.(cuda|npu|xpu|mps)""")
    found = [str(p) for p in modules() if p.name != "device.py" and pattern.search(p.read_text("utf-8"))]
    assert not found


def test_light_rooms_do_not_load_torch() -> None:
    heavy = [
        str(p)
        for p in modules()
        if p.relative_to(PACKAGE).parts[0] in NO_TORCH and any(n.split(".")[0] == "torch" for n in imported(p))
    ]
    assert not heavy


@pytest.mark.parametrize(
    "code",
    [
        "import hadal",
        "import hadal.cli, typer.testing; typer.testing.CliRunner().invoke(hadal.cli.app, ['--help'])",
        "import hadal.text",
    ],
)
def test_torch_is_not_loaded_before_it_is_needed(code: str) -> None:
    check = f"{code}\nimport sys; sys.exit(sorted(m for m in sys.modules if m == 'torch' or m == 'transformers') != [])"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_tools_accept_the_tree(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_product_text_names_no_machine_path() -> None:
    pattern = re.compile(r"""["'(= `]/(work|root|home|opt|tmp)/[a-z]""")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        if name.endswith((".py", ".md", ".toml")) and name != "tests/test_structure.py":
            assert not pattern.search((ROOT / name).read_text("utf-8")), name
