"""The house: who may import whom, what may be imported when, and how long things may get. Read from the sources, not from a list."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from proxsparse_triton.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "proxsparse_triton"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)

FLOORS = {
    **dict.fromkeys(("errors", "files", "progress", "sparsity", "step", "marks", "interrupts"), 0),
    **dict.fromkeys(("kernels", "reference"), 1),
    "ops": 2,
    **dict.fromkeys(("optim", "calibration", "models"), 3),
    **dict.fromkeys(("training", "inference", "formats", "evaluation", "report"), 4),
    "methods": 5,
    **dict.fromkeys(("pipeline", "comparison", "planning", "export", "benchmarks"), 6),
    **dict.fromkeys(("__main__", "process", "cli", "commands"), 7),
}
# The arrows between two parts of one floor; every other import stays in its part or goes down.
ARROWS = {
    ("sparsity", "errors"),
    ("step", "errors"),
    ("comparison", "pipeline"),
    ("planning", "pipeline"),
    ("benchmarks", "planning"),
    ("benchmarks", "export"),
    ("cli", "commands"),
    ("cli", "process"),
    ("__main__", "process"),
    ("__main__", "cli"),
}
# Imported inside functions only: they cost seconds, or are not installed everywhere.
HEAVY = {"transformers", "datasets", "lm_eval", "pyarrow", "huggingface_hub", "tokenizers", "matplotlib", "triton"}
MAX_FILE, MAX_FUNCTION = 400, 60


def part_of(path: Path) -> str:
    """`ops` for ops/prox.py, `cli` for cli.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, *, module_level: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements below `node`; with `module_level` only those that run on import (no functions, no TYPE_CHECKING)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif module_level and (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(child)):
            continue
        else:
            yield from imports(child, module_level=module_level)


def absolute_names(path: Path, statement: ast.Import | ast.ImportFrom) -> list[str]:
    """Full dotted names that a statement may import: `from ..ops import mask_24` in methods/ -> proxsparse_triton.ops.mask_24."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if not statement.level:
        return [f"{statement.module}.{alias.name}" for alias in statement.names]
    package = ["proxsparse_triton", *path.relative_to(PACKAGE).parts[:-1]]
    base = package[: len(package) - statement.level + 1]
    assert base, f"{path} imports from above the package"
    prefix = ".".join([*base, *([statement.module] if statement.module else [])])
    return [f"{prefix}.{alias.name}" for alias in statement.names]


def own_parts(path: Path, *, module_level: bool = False) -> set[str]:
    """The parts of this package that a module imports."""
    found = set()
    for statement in imports(tree_of(path), module_level=module_level):
        for name in absolute_names(path, statement):
            steps = name.split(".")
            if steps[0] == "proxsparse_triton" and steps[1] != "assets":
                found.add(steps[1])
    return found


def third_party(path: Path) -> set[str]:
    """Top-level packages that importing the module imports directly."""
    names = (name for statement in imports(tree_of(path), module_level=True) for name in absolute_names(path, statement))
    return {name.split(".")[0] for name in names}


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


every_module = pytest.mark.parametrize("path", MODULES, ids=relative)


def test_the_scan_sees_the_package() -> None:
    """Guards the tests below against passing because they look at nothing."""
    assert {part_of(path) for path in MODULES} >= {
        "errors",
        "kernels",
        "ops",
        "models",
        "training",
        "methods",
        "pipeline",
        "cli",
        "commands",
    }
    assert own_parts(PACKAGE / "methods" / "wanda.py") >= {"ops", "models", "methods"}
    assert own_parts(PACKAGE / "ops" / "prox.py") >= {"kernels", "reference"}  # kernels: inside a function
    assert "kernels" not in own_parts(PACKAGE / "ops" / "prox.py", module_level=True)
    assert "triton" in third_party(PACKAGE / "kernels" / "prox.py")


@every_module
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not own_parts(path), "the package's own __init__ imports lazily, by name"
        return
    for other in own_parts(path) - {part}:
        allowed = FLOORS[other] < FLOORS[part] or (part, other) in ARROWS
        assert allowed, f"{relative(path)} (floor {FLOORS[part]}) imports {other} (floor {FLOORS[other]})"


@every_module
def test_only_ops_imports_kernels(path: Path) -> None:
    if part_of(path) != "kernels" and "kernels" in own_parts(path):
        assert part_of(path) == "ops"
        assert "kernels" not in own_parts(path, module_level=True), "lazily, so that the package works without Triton"


@every_module
def test_relative_imports_inside_the_package(path: Path) -> None:
    for statement in imports(tree_of(path), module_level=False):
        if isinstance(statement, ast.Import) or not statement.level:
            assert not any(name.split(".")[0] == "proxsparse_triton" for name in absolute_names(path, statement))


@every_module
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    heavy = third_party(path) & HEAVY
    assert heavy <= ({"triton"} if part_of(path) == "kernels" else set())


@pytest.mark.parametrize("path", [path for path in MODULES if FLOORS.get(part_of(path)) == 7], ids=relative)
def test_command_files_import_click_the_standard_library_and_light_modules(path: Path) -> None:
    assert third_party(path) <= {"click", "proxsparse_triton", *sys.stdlib_module_names}
    assert own_parts(path, module_level=True) <= {"commands", "errors", "interrupts", "process", "progress"}


@every_module
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_FILE
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length < MAX_FUNCTION, f"{node.name} has {length} lines"


def test_one_stem_per_operation() -> None:
    """kernels, reference, ops and their tests call an operation by the same word; the helpers beside it are named here."""
    helpers = {
        "ops": {"dispatch", "partial", "sharded"},
        "reference": {"block", "metadata", "storage"},
        "kernels": {
            *("block", "partial", "pending", "ptx", "solver", "sweeps"),
            *("compiled", "fragments", "hopper", "hopper_launch", "launch", "staging", "warpgroup"),  # of sparse_linear, but launch
        },
    }
    stems = {folder: {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"} - extra for folder, extra in helpers.items()}
    assert stems["kernels"] == stems["reference"] == stems["ops"]
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")} >= stems["ops"]


def test_the_library_has_no_print_and_no_bare_except() -> None:
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{relative(path)}:{node.lineno}"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{relative(path)}:{node.lineno}"
            if part_of(path) != "kernels":
                assert not isinstance(node, ast.Assert), f"{relative(path)}:{getattr(node, 'lineno', 0)}"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = python("import sys, proxsparse_triton; print(*sys.modules)").split()
    assert not {"torch", "triton", "numpy", *HEAVY} & set(loaded)


def test_help_imports_no_torch() -> None:
    """The group's help and every command's own: both are instant."""
    code = """
import sys
from click.testing import CliRunner
from proxsparse_triton.cli import COMMANDS, main
result = CliRunner().invoke(main, ["--help"])
assert result.exit_code == 0, result.output
assert all(name in result.output for name in COMMANDS)
assert not any(module.startswith("proxsparse_triton.commands.") for module in sys.modules)
for name in COMMANDS:
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
print(*sys.modules)
"""
    assert not {"torch", "rich", *HEAVY} & set(python(code).split())


def test_operations_work_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from proxsparse_triton import frozen_penalty, mask_24, prox_24
w = torch.randn(4, 8)
prox_24(w, 0.5), mask_24(w.abs()), frozen_penalty(w, w, 1.0, 0.1)
import proxsparse_triton.pipeline, proxsparse_triton.comparison
print("done")
"""
    assert python(code).strip() == "done"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages if page.exists())
    assert f"pst {command}" in text, f"`pst {command}` stands neither in README.md nor in docs/"


def test_every_command_file_is_a_command() -> None:
    files = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__", "console", "options", "eval_table"}
    assert files == {module for module, _, _ in COMMANDS.values()}
