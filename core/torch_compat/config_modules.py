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
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from vllmc.core.syntax import parse_module

_HEAVY: Final = frozenset({"torch._inductor.config", "torch._dynamo.config"})


def import_config(name: str) -> Any:
    """The config module that compilation reads."""
    return importlib.import_module(name)


def present_config(name: str) -> Any:
    """The config module if it has been imported, else a stand-in with the same options and values.

    Options set on a stand-in reach no compilation.
    """
    if name in _HEAVY and name not in sys.modules:
        return _stand_in(name)
    return import_config(name)


def value_of(module: Any, name: str) -> Any:
    """The value of an option of a config module, deprecated ones too."""
    if getattr(module._config[name], "deprecated", False):
        # Reading the attribute would warn.
        return module.get_config_copy()[name]
    return getattr(module, name)


def config_file(name: str) -> Path:
    """The source of a config module of torch."""
    found = importlib.util.find_spec("torch")
    assert found is not None, "vllmc requires torch"
    assert found.origin is not None, "torch is a package with an __init__.py"
    return Path(found.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")


@functools.cache
def _stand_in(name: str) -> ModuleType:
    file = config_file(name)
    tree = _without_the_compiler(parse_module(file.read_bytes()))
    module = ModuleType(f"{__name__}:{name}")
    module.__file__ = str(file)
    # The source ends in install_config_module(sys.modules[__name__]).
    sys.modules[module.__name__] = module
    exec(compile(tree, file, "exec", dont_inherit=True), vars(module))
    return module


def _without_the_compiler(tree: ast.Module) -> ast.Module:
    """The source less its import of Inductor, which only annotations of custom passes use."""
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
