"""What CONTRIBUTING.md's map promises: imports go one way, privates stay where they are, commands are thin."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import l2p_fast

PACKAGE = Path(l2p_fast.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in (*MODULES, *OUTSIDE)}
by_path = {"ids": lambda path: str(path.relative_to(ROOT))}

# A part imports only parts of earlier rows; imports inside functions and for type hints count like any other. All
# files that aren't named are commands.
ROWS = (
    ("__init__",),
    ("errors", "variants"),
    ("files", "startup"),
    ("ops", "formats"),
    ("models",),
    ("quantize",),
    ("loading",),
    ("sampling",),
    ("evaluation",),
    ("training", "serving", "datamaking"),
)
RANK = {part: rank for rank, parts in enumerate(ROWS) for part in parts}
COMMANDS = [path for path in MODULES if path.parent == PACKAGE and path.stem not in (*RANK, "__init__")]


def part_of(path: Path) -> str:
    """The first name below the package: a folder's, or a file's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(dotted module, name taken from it or None) of every import of our own, wherever in the file it stands."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "l2p_fast")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "l2p_fast":
                yield from ((module, alias.name) for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    found = set()
    for module, name in imports(path):
        parts = module.split(".")[1:] or [name or "__init__"]
        if (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file():
            found.add(parts[0])  # else it is one of the package's own names
    return found


@pytest.mark.parametrize("path", MODULES, **by_path)
def test_arrows(path):
    part = part_of(path)
    for other in parts_imported(path) - {part}:
        assert RANK.get(other, len(ROWS)) < RANK.get(part, len(ROWS)), f"{part} must not import {other}"


@pytest.mark.parametrize("path", COMMANDS, **by_path)
def test_commands_are_thin(path):
    assert len(path.read_text().splitlines()) <= 250


@pytest.mark.parametrize("path", [*MODULES, *OUTSIDE], **by_path)
def test_commands_are_not_imported(path):
    commands = {command.stem for command in COMMANDS}
    assert not commands & (parts_imported(path) - {part_of(path) if path in MODULES else None})


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def privates_of(path: Path) -> set[str]:
    """Private names that a file defines: functions, classes, methods, attributes, constants."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("path", [*MODULES, *OUTSIDE], **by_path)
def test_privates_stay_in_their_file(path):
    taken = {name for module, name in imports(path) if name and name in privates_of(file_of(module))}
    others = set().union(*(privates_of(other) for other in MODULES if other != path)) - privates_of(path)
    reached = {node.attr for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)} & others
    assert not taken | reached, "give it a public name, or leave it to its own file"


def test_file_names_are_unique():
    names = Counter(path.stem for path in MODULES if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []
