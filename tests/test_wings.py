"""Imports go from higher wings to lower ones, never in a circle, and reach the kernels through one file."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest to the highest; "fastvq" is the face, __init__.py.
WINGS = (
    "fastvq.common",
    "fastvq.reference",
    "fastvq.straight_through",
    "fastvq.cpu",
    "fastvq.backends",
    "fastvq.functional",
    "fastvq.learning",
    "fastvq.nn",
    "fastvq",
    "fastvq.testing",
    "fastvq.cli",
    "fastvq.__main__",
)
PACKAGES = {"fastvq": ROOT, "fastvq_kernels": ROOT / "kernels", "bench": ROOT}


@cache
def imports(package):
    """The modules of ``package``, each with the modules of this project that it imports, anywhere in the file."""
    files = {}
    for path in sorted((PACKAGES[package] / package).rglob("*.py")):
        parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: _imported(name, path, files) for name, path in files.items()}


def _imported(name, path, files):
    here = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            each = {f"{base}.{alias.name}" for alias in node.names}
            found |= {full if full in files else base for full in each}
    return {module for module in found if module.partition(".")[0] in PACKAGES}


def wing(module):
    return next(
        i for i, name in enumerate(WINGS) if module == name or (name != "fastvq" and module.startswith(f"{name}."))
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package):
    graph = {name: {module for module in found if module != name} for name, found in imports(package).items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph) > 10  # raises CycleError


def test_no_import_from_a_lower_wing_to_a_higher_one():
    arrows = [
        (name, module) for name, found in imports("fastvq").items() for module in found if module in imports("fastvq")
    ]
    assert len(arrows) > 100
    assert [arrow for arrow in arrows if wing(arrow[0]) < wing(arrow[1])] == []


def test_one_file_imports_the_kernels():
    assert [n for n, found in imports("fastvq").items() if any(m.startswith("fastvq_kernels") for m in found)] == [
        "fastvq.backends.triton"
    ]


def test_kernels_import_nothing_of_the_project_but_themselves():
    modules = set().union(*imports("fastvq_kernels").values())
    assert {module.partition(".")[0] for module in modules} == {"fastvq_kernels"}
