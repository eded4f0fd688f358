"""What a field of a Config means: its help text."""

import ast
import inspect
from dataclasses import fields
from itertools import pairwise
from types import MappingProxyType


def documented(config: type) -> type:
    """The dataclass, where `metadata["help"]` of each field is the docstring below it, or below the one it replaces."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {f.name: f.metadata["help"] for base in reversed(config.__mro__[1:-1]) for f in fields(base)}
    texts |= {
        name.target.id: ast.literal_eval(text.value)
        for name, text in pairwise(tree.body)
        if isinstance(name, ast.AnnAssign) and isinstance(name.target, ast.Name) and isinstance(text, ast.Expr)
    }
    for f in fields(config):
        f.metadata = MappingProxyType({**f.metadata, "help": texts[f.name]})
    return config
