"""Imports go from higher wings to lower ones, never in a circle, and reach the kernels through one file."""

import ast
from functools import cache
from graphlib import TopologicalSorter

import pytest
from checkout import ROOT

# From the lowest to the highest; "fastvq" is the face, __init__.py.
WINGS = ("common", "reference", "straight_through", "cpu", "backends", "functional", "learning", "nn", "fastvq")
WINGS += ("testing", "cli", "__main__")
PACKAGES = {"fastvq": ROOT, "fastvq_kernels": ROOT / "kernels", "bench": ROOT}


@cache
def imports(package):
    """The modules of ``package``, each with the modules of this project that it imports, anywhere in the file."""
    files = {}
    for path in sorted((PACKAGES[package] / package).rglob("*.py")):
        files[".".join(path.relative_to(PACKAGES[package]).with_suffix("").parts).removesuffix(".__init__")] = path
    return {name: imported(name, path, files) for name, path in files.items()}


def imported(name, path, files):
    here = [*name.split("."), ""][: None if path.stem == "__init__" else -1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*here[: -node.level], *([node.module] if node.module else [])] if node.level else [node.module]
            )
            found |= {full if (full := f"{base}.{alias.name}") in files else base for alias in node.names}
    return {module for module in found - {name} if module.partition(".")[0] in PACKAGES}


def wing(module):
    return WINGS.index([*module.split("."), "fastvq"][1])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package):
    assert len(list(TopologicalSorter(imports(package)).static_order())) > 20  # raises CycleError


def test_no_import_from_a_lower_wing_to_a_higher_one():
    own = imports("fastvq")
    arrows = [(name, module) for name, found in own.items() for module in found if module in own]
    assert len(arrows) > 100
    assert [arrow for arrow in arrows if wing(arrow[0]) < wing(arrow[1])] == []


def test_one_file_imports_the_kernels():
    users = {name for name, found in imports("fastvq").items() if any("fastvq_kernels" in module for module in found)}
    assert users == {"fastvq.backends.triton"}


def test_kernels_import_nothing_of_the_project_but_themselves():
    modules = set().union(*imports("fastvq_kernels").values())
    assert {module.partition(".")[0] for module in modules} == {"fastvq_kernels"}
