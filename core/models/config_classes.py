"""Transformers' configuration classes, without the modeling code that they would import.

`transformers.utils.type_validators` takes the names of activations from `transformers.activations`,
which imports torch._dynamo, torch.distributed and sympy: more than a second, for a check that one
class in Transformers 5.23 asks for (of a speech model). It leaves the check out where there are no
names, as without torch, so its source is run without that import.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib import import_module
from pathlib import Path

from vllmc.core.syntax import parse_module

_PACKAGE = "transformers.utils"
_VALIDATORS = f"{_PACKAGE}.type_validators"


def import_validators() -> None:
    """Imports what configuration classes validate their fields with, once."""
    if _VALIDATORS in sys.modules:
        return
    spec = importlib.util.find_spec(_VALIDATORS)
    if spec is None or spec.origin is None:
        # An older Transformers has none.
        return
    tree = _WithoutActivations().visit(parse_module(Path(spec.origin).read_bytes()))
    module = importlib.util.module_from_spec(spec)
    code = compile(ast.fix_missing_locations(tree), spec.origin, "exec", dont_inherit=True)
    exec(code, vars(module))
    # Another thread may have imported the whole of it meanwhile.
    sys.modules.setdefault(_VALIDATORS, module)
    vars(import_module(_PACKAGE)).setdefault("type_validators", sys.modules[_VALIDATORS])


class _WithoutActivations(ast.NodeTransformer):
    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        """`from ..activations import ACT2FN` becomes `ACT2FN = {}`."""
        if (node.module, node.level) != ("activations", 2):
            return node
        names: list[ast.expr] = [ast.Name(alias.name, ast.Store()) for alias in node.names]
        return ast.copy_location(ast.Assign(targets=names, value=ast.Dict([], [])), node)
