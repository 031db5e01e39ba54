"""Importing stays light, and modules only import what lies before them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import l2p_fast

PACKAGE = Path(l2p_fast.__file__).parent

# Data flows one way: a module imports only from layers before its own. Modules not named are command lines or stand on
# top of everything, and nothing named imports them.
LAYERS = (
    ("errors",),
    ("files",),
    ("ops", "flow", "attention"),
    ("text", "dit", "detailer"),
    ("model",),
    ("checkpoint", "parallel"),
    ("pipeline",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS)
# The class loads and saves itself through checkpoint.py, inside a method.
LATE = {("model", "checkpoint")}


def imported(path: Path) -> set[tuple[str, bool]]:
    """Every import from this package, type hints left out: (the module's first name, whether at module level)."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = set()

    def visit(node: ast.AST, top_level: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "l2p_fast" else [module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "l2p_fast" and len(parts) > 1 and not parts[1].startswith("_"):
                found.add((parts[1], top_level))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, top_level and not inside)

    visit(ast.parse(path.read_text()), True)
    return found


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
    module = module_of(path)
    if module == "__init__":
        return
    for other, top_level in imported(path):
        if other == module or ((module, other) in LATE and not top_level):
            continue
        rank = RANK.get(module, TOP)
        assert rank == TOP or RANK.get(other, TOP) < rank, f"{module} must not import {other}"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(said.split())


def test_importing_the_package_loads_nothing_heavy():
    modules = loaded_after("import l2p_fast")
    heavy = {"torch", "diffusers", "transformers", "numpy", "PIL", "l2p_fast._build", "l2p_fast.ops"}
    assert "l2p_fast" in modules and not heavy & modules


def test_command_lines_answer_before_torch_is_loaded():
    assert "torch" not in loaded_after("import l2p_fast.sample, l2p_fast.info")


def test_ops_load_no_model_libraries():
    assert not {"diffusers", "transformers"} & loaded_after("import l2p_fast.ops")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = l2p_fast.Nothing
