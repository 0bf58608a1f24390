"""The rooms of the source: imports point down, and nothing outside reaches into a Mechanic."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import manic

ROOT = Path(manic.__file__).parent

# From the bottom to the top. A module imports only modules of the rows before its own, and those that stand before it
# in its row.
ROWS = [
    ["tuner", "parameters", "units", "chains"],
    ["collectives", "scale_free", "diagnostics", "schedules", "bases"],
    ["sweeps.eager", "sweeps.base", "sweeps.native", "sweeps.triton_kernels", "sweeps.kernels", "sweeps.passes"],
    ["checkpoint.record", "checkpoint.older", "checkpoint.validation", "checkpoint.loading"],
    ["wrapper", "algorithm", "run", "mechanic"],
    ["optim", "callbacks", "checkpoint.inspection", "__main__"],
]
ORDER = {module: place for place, module in enumerate(module for row in ROWS for module in row)}


def modules() -> dict[str, Path]:
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.endswith("__init__")}


def imports(path: Path) -> Iterator[str]:
    """What a module imports of manic, wherever in the file: "sweeps.base"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("manic"):
            place = node.module.removeprefix("manic").lstrip(".")
            inside = [f"{place}.{alias.name}".lstrip(".") for alias in node.names]
            yield from [name for name in inside if name in ORDER] or [place]


def test_every_module_has_a_place() -> None:
    assert modules().keys() == ORDER.keys()


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name: str) -> None:
    found = [other for other in imports(modules()[name]) if other]  # "": the version, which stands in manic itself
    assert [other for other in found if ORDER[other] >= ORDER[name]] == []


def test_nobody_reaches_into_a_mechanic() -> None:
    for name, path in modules().items():
        if name != "mechanic":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mechanic":
                    assert not node.attr.startswith("_"), f"{name}: mechanic.{node.attr}"


def test_no_file_and_no_class_is_too_long() -> None:
    for path in modules().values():
        text = path.read_text()
        assert text.count("\n") <= 450, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno <= 300, f"{path.name}: {node.name}"
