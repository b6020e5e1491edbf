"""Names of the functions that a graph calls: the same in every process, and found again by them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from vllmc.core.errors import VllmcError

_OPS = "torch.ops."
_METHODS = "torch.Tensor."
_ALLOCATIONS: frozenset[object] = frozenset(
    {torch.empty, torch.empty_like, torch.empty_permuted, torch.empty_strided}
)
_ALLOCATING_METHODS = frozenset({"new_empty", "new_empty_strided"})
_ALLOCATING_OPS = ("aten::empty", "aten::new_empty")


def op_names(target: object) -> frozenset[str]:
    """`namespace::name` of a registered op, also with its overload; of no other function."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target._schema.name)
        return frozenset({name, f"{name}.{target._overloadname}"})
    if isinstance(target, torch._ops.OpOverloadPacket):
        return frozenset({target._qualified_op_name})
    return frozenset()


def schemas_of(target: object) -> tuple[torch._C.FunctionSchema, ...]:
    """The schemas of a registered op: of all its overloads where none was chosen."""
    if isinstance(target, torch._ops.OpOverload):
        return (target._schema,)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return tuple(getattr(target, name)._schema for name in target.overloads())
    return ()


def custom_ops(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The `namespace::name` of each registered op that the nodes call, sorted."""
    found = {name.partition(".")[0] for node in nodes for name in op_names(node.target)}
    return tuple(sorted(found))


def target_name(node: fx.Node) -> str:
    """The name of what `node` calls: a method's own, else one that `find_target` takes.

    Raises `VllmcError` (`unsupported-model`) for a function that no name leads to, such as a
    lambda.
    """
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"{_OPS}{target}"
    return ".".join(import_path(target))


def import_path(value: object) -> tuple[str, str]:
    """The module and the dotted name in it under which `value` is found; raises as `target_name`.

    The name comes before the qualified one, which all of torch's dispatched functions
    (`max_pool1d`, `max_pool2d`) have in common.
    """
    module = getattr(value, "__module__", None)
    names = (getattr(value, "__name__", None), getattr(value, "__qualname__", None))
    for place in filter(None, (module, "torch", "torch._C")):
        for name in filter(None, names):
            if "<" not in name and _resolve(place, name) is value:
                return place, name
    raise VllmcError(
        "unsupported-model",
        f"the graph calls {value!r}, which no other process can find by name",
        hint="make it a function of a module, or an op of torch.library",
    )


def import_by_name(module: str, name: str) -> Any:
    """The object called `name` (dotted; empty for the module itself) in `module`.

    Raises `ImportError` and `AttributeError`.
    """
    found: Any = importlib.import_module(module)
    for part in name.split(".") if name else ():
        found = getattr(found, part)
    return found


def find_target(name: str) -> Any:
    """The function that a record calls `name`. Raises `VllmcError` (`unknown-op`)."""
    try:
        if name.startswith(_OPS):
            return import_by_name("torch", name.removeprefix("torch."))
        module, _, attribute = name.rpartition(".")
        while True:
            try:
                return import_by_name(module, attribute)
            except ModuleNotFoundError:
                # A class stands between the module and the function.
                module, dot, part = module.rpartition(".")
                if not dot:
                    raise
                attribute = f"{part}.{attribute}"
    except (AttributeError, ImportError, ValueError) as error:
        raise VllmcError(
            "unknown-op",
            f"the program calls {name}, which is not registered in this process",
            context={"cause": str(error)},
            hint="import the module that registers it before running",
        ) from error


def spelled(node: fx.Node) -> str:
    """The name by which `--splitting-op` means what `node` calls."""
    if isinstance(node.target, str):
        return f"{_METHODS}{node.target}"
    names = op_names(node.target)
    return min(names, key=len) if names else target_name(node)


def nearest_names(name: str, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Up to three of the names that `nodes` are spelled by, the likeliest meant by `name` first."""
    known = sorted({spelled(node) for node in nodes})
    last = _last_part(name)
    same = [candidate for candidate in known if _last_part(candidate) == last]
    close = difflib.get_close_matches(name, known, n=3)
    return tuple(dict.fromkeys([*same, *close]))[:3]


def _last_part(name: str) -> str:
    return name.replace("::", ".").rpartition(".")[2]


def _resolve(module: str, name: str) -> object:
    try:
        return import_by_name(module, name)
    except (ImportError, AttributeError):
        return None


def allocates(node: fx.Node) -> bool:
    """Whether a node makes a tensor that nothing is written to yet."""
    if node.op == "call_method":
        return node.target in _ALLOCATING_METHODS
    return node.target in _ALLOCATIONS or any(
        name.startswith(_ALLOCATING_OPS) for name in op_names(node.target)
    )
