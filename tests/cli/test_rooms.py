"""The tree: rooms of a dozen files, files and functions that one can read, names that mean one thing.

Which room may import which is checked by import-linter (`make lint`; contracts in pyproject.toml).
"""

import ast
from collections import Counter
from pathlib import Path

import pytest
import visibench

ROOT = Path(visibench.__file__).parent
OUTSIDE = {"tests", "benchmarks", "examples", "docs", "build", ".git"}
MODULES = [file for file in ROOT.rglob("*.py") if not OUTSIDE & set(file.relative_to(ROOT).parts)]
CATALOGUES = {"methods", "commands", "models/adapters"}
"""Rooms with one file an entry: one a method, one a command, one a model family."""
FILES, LINES, SCREEN = 14, 400, 60


def nodes(kind, files=MODULES):
    return [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kind)]


def test_no_room_is_crowded():
    rooms = Counter(str(file.parent.relative_to(ROOT)) for file in MODULES if file.name != "__init__.py")
    assert {room: count for room, count in rooms.items() if count > FILES and room not in CATALOGUES} == {}


def test_every_room_says_what_lives_there():
    maps = {file.parent: file for file in MODULES if file.name == "__init__.py"}
    assert {file.parent for file in MODULES} == set(maps)
    assert [str(file) for file in maps.values() if not ast.get_docstring(ast.parse(file.read_text()))] == []


@pytest.mark.parametrize("most", [LINES])
def test_files_end_before_the_reader_does(most):
    files = [*MODULES, *(ROOT / "tests").rglob("*.py")]
    assert {str(file): count for file in files if (count := len(file.read_text().splitlines())) > most} == {}


def test_functions_fit_a_screen():
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    long = {
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}": lines
        for file, node in functions
        if (lines := node.end_lineno - node.lineno + 1) > SCREEN
    }
    assert long == {}


def test_a_class_name_means_one_thing():
    names = Counter(node.name for _, node in nodes(ast.ClassDef) if not node.name.startswith("_"))
    assert {name: count for name, count in names.items() if count > 1} == {}
