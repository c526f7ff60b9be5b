"""Docstrings of public functions, or of their class, give the shapes of tensors."""

import ast
import re
from pathlib import Path

import pytest

import dn_detr

PACKAGE = Path(dn_detr.__file__).parent
SHAPE = re.compile(r"\[(\.\.\.|[^\[\]]*\b[A-Za-z0-9][^\[\]]*)?\]|\bscalar|\bany shape")
"""[B, Q, 4], [L], [n, H, W], [..., 2], "scalar" or "of any shape"."""
STATE = re.compile(r"(dict|Mapping)\[str, (torch\.)?Tensor\]")
"""Parameters by name: their shapes are those of a model."""


def tensor_functions():
    """(place, docstrings) of every public function or method with Tensor in its signature."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        owners = [(tree, "")] + [
            (node, ast.get_docstring(node) or "")
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        ]
        module = ast.get_docstring(tree) or ""
        for owner, about in owners:
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef):
                    continue
                is_public = not node.name.startswith("_") or node.name == "__call__"
                given = [a for a in ast.walk(node.args) if isinstance(a, ast.arg)]
                annotations = [a.annotation for a in given]
                texts = [ast.unparse(a) for a in (*annotations, node.returns) if a is not None]
                if is_public and any(
                    re.search(r"\bTensor\b", STATE.sub("", text)) for text in texts
                ):
                    place = f"{path.relative_to(PACKAGE)}:{getattr(owner, 'name', '')}.{node.name}"
                    yield place, (ast.get_docstring(node) or "", about, module)


FUNCTIONS = dict(tensor_functions())


@pytest.mark.parametrize("place", FUNCTIONS)
def test_shapes_are_in_the_docstring(place):
    assert any(SHAPE.search(text) for text in FUNCTIONS[place]), place


def test_most_functions_of_the_package_are_seen():
    assert len(FUNCTIONS) > 150
