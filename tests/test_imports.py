"""Modules import one another in one direction only, and no package takes a private name from another.

import-linter holds the layers; it neither sees a circle within a room nor the names that are imported. Here imports within
functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.launch import ROOT

FOLDERS = {"fastjepa": ROOT, "fastjepa_kernels": ROOT / "kernels", "benchmarks": ROOT}


def modules() -> dict[str, Path]:
    """Module name -> its file, for all three packages."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in (folder / package).rglob("*.py"):
            name = ".".join(file.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


def imports(file: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a file, but for those that only a type checker reads."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    ignored = {id(inner) for block in blocks for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in ignored:
            yield node


def import_graph() -> dict[str, set[str]]:
    """The modules that each module names in an import.

    Python imports the packages around a module as well. That is left out, since every module would import the top one.
    """
    files = modules()
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, file in files.items():
        for node in imports(file):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & files.keys()
            else:
                assert node.level == 0, f"{file}: line {node.lineno}: a relative import, expected an absolute one"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= {name if name in files else str(node.module) for name in names} & files.keys()
        graph[module].discard(module)
    return graph


def test_there_is_no_circle_of_imports() -> None:
    order = list(TopologicalSorter(import_graph()).static_order())  # CycleError names the circle
    assert len(order) > 150


@pytest.mark.parametrize("package", FOLDERS)
def test_no_package_imports_a_private_name_of_another(package: str) -> None:
    files = modules()
    taken = [
        f"{module}, line {node.lineno}: {node.module}.{alias.name}"
        for module, file in files.items()
        if module.partition(".")[0] == package
        for node in imports(file)
        if isinstance(node, ast.ImportFrom) and node.module in files
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
        if node.module.rpartition(".")[0] != module.rpartition(".")[0]
    ]
    assert not taken
