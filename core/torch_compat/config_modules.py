"""Torch's config modules, read without the compilers that they belong to.

`import torch._inductor.config` imports all of Dynamo and Inductor (1 s), which a warm start has no
other need of. While neither has been imported, nothing can have changed their options: what the
environment makes of the config's own source is all there is to know. Importing this imports no
torch.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from vllmc.core.errors import UsageError
from vllmc.core.syntax import parse_module

_HEAVY: Final = frozenset({"torch._inductor.config", "torch._dynamo.config"})
_VARIABLE: Final = re.compile(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b")


def import_config(name: str) -> Any:
    """The config module that compilation reads."""
    return importlib.import_module(name)


def present_config(name: str) -> Any:
    """The config module if it has been imported, else a stand-in with the same options and values.

    Options set on a stand-in reach no compilation. Raises `UsageError` (`bad-variable`).
    """
    if name in _HEAVY and name not in sys.modules:
        return _stand_in(name)
    return import_config(name)


def value_of(module: Any, name: str) -> Any:
    """The value of an option of a config module, deprecated ones too."""
    entry = module._config[name]
    if not getattr(entry, "deprecated", False):
        return getattr(module, name)
    # Reading the attribute would warn.
    if entry.alias is not None:
        owner, _, option = entry.alias.rpartition(".")
        return value_of(present_config(owner), option)
    return module.get_config_copy()[name]


def config_file(name: str) -> Path:
    """The source of a config module of torch."""
    found = importlib.util.find_spec("torch")
    assert found is not None, "vllmc requires torch"
    assert found.origin is not None, "torch is a package with an __init__.py"
    return Path(found.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")


@functools.cache
def _stand_in(name: str) -> ModuleType:
    file = config_file(name)
    tree = _without_compilers(parse_module(file.read_bytes()))
    module = ModuleType(f"{__name__}:{name}")
    module.__file__ = str(file)
    # The source ends in install_config_module(sys.modules[__name__]).
    sys.modules[module.__name__] = module
    try:
        exec(compile(tree, file, "exec", dont_inherit=True), vars(module))
    except ValueError as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        variables = _variables_at(tree, lines[-1] or 0) if lines else []
        raise UsageError(
            "bad-variable",
            f"{name} refuses the value of {' or '.join(variables) or 'a variable'}: {error}",
            context={"config": name, "variables": variables},
            hint="set it otherwise or unset it; torch's compiler cannot be imported like this",
        ) from error
    return module


def _variables_at(tree: ast.Module, line: int) -> list[str]:
    """The variables that are named around a line: in the least that holds it and names any."""
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and _holds(n, line)]
    for node in sorted(around, key=lambda node: (node.end_lineno or 0) - node.lineno):
        texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
        named = (_VARIABLE.findall(text) for text in texts if isinstance(text, str))
        if found := dict.fromkeys(name for names in named for name in names):
            return list(found)
    return []


def _holds(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _without_compilers(tree: ast.Module) -> ast.Module:
    """The source less its imports of Inductor and of what Triton lacks, which bring both along.

    Inductor is used in annotations of custom passes only.
    """
    tree = _WithoutTriton().visit(tree)
    body: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.Import) and all(_heavy(alias.name) for alias in node.names):
            continue
        if isinstance(node, ast.AnnAssign) and _heavy(ast.unparse(node.annotation)):
            node.annotation = ast.copy_location(ast.Name("Callable", ast.Load()), node.annotation)
        body.append(node)
    tree.body = body
    return tree


def _heavy(text: str) -> bool:
    return "torch._inductor." in text


class _WithoutTriton(ast.NodeTransformer):
    """Has an import of a module that Triton may have, and has not, fail without Triton's own."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        package, _, module = (node.module or "").partition(".")
        if package != "triton" or not module:
            return node
        found = importlib.util.find_spec(package)
        roots = (found.submodule_search_locations or []) if found else []
        place = module.replace(".", "/")
        if any(Path(root, name).exists() for root in roots for name in (place, f"{place}.py")):
            return node
        absent = ast.copy_location(ast.Raise(exc=ast.Name("ImportError", ast.Load())), node)
        return ast.fix_missing_locations(absent)
