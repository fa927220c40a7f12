"""The modules of the kernels import one another in one direction only."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import fastjepa_kernels

PACKAGE = Path(fastjepa_kernels.__file__).parent


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """The modules that each module names in an import, within functions too.

    Python imports the packages around a module as well. That is left out, since every module would import the top one.
    """
    files = {module_name(file): file for file in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: line {node.lineno}: a relative import, expected an absolute one"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= {name if name in files else str(node.module) for name in names} & files.keys()
    return graph


def test_there_is_no_circle_of_imports() -> None:
    order = list(TopologicalSorter(import_graph()).static_order())  # CycleError names the circle
    assert order[-1] == "fastjepa_kernels"
    assert len(order) > 15
