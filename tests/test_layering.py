"""Subpackages import only downwards, in the one order that the package, README and design state."""

import ast
import pathlib
import re

import pytest

import qwen_jax

ROOT = pathlib.Path(qwen_jax.__file__).parent


def stated_order() -> list[str]:
    """Returns the subpackages as the docstring of `qwen_jax` orders them, highest first."""
    block = qwen_jax.__doc__.split("::\n\n", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"\w+", block.replace("->", " "))


ORDER = stated_order()


def imported(path: pathlib.Path) -> set[str]:
    """Returns the subpackages of `qwen_jax` that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    parts = (name.split(".") for name in names if name.startswith("qwen_jax."))
    return {part[1] for part in parts} & set(ORDER)


def test_import_order_lists_every_subpackage():
    assert sorted(ORDER) == sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("package", ORDER)
def test_subpackages_import_only_from_lower_ones(package):
    allowed = set(ORDER[ORDER.index(package) :])
    for path in (ROOT / package).rglob("*.py"):
        assert imported(path) <= allowed, f"{path} imports {sorted(imported(path) - allowed)}"


def test_foundation_modules_import_no_subpackage():
    for path in ROOT.glob("*.py"):
        if path.name != "__init__.py":
            assert not imported(path), f"{path} imports {sorted(imported(path))}"


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_pages_list_subpackages_in_the_same_order(page):
    text = (ROOT.parent / page).read_text("utf-8")
    rows = re.findall(r"^(?:\| `qwen_jax/(\w+)/`|  (\w+)/ )", text, flags=re.M)
    assert [a or b for a, b in rows] == ORDER
