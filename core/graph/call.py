"""A call of a module as capture makes it: its tensors with sizes that vary, its other arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import sympy
import torch
import torch.fx as fx

from vllmc.core.cache.key import JsonValue
from vllmc.core.declare.containers import leaves, map_tensors
from vllmc.core.declare.declaration import declaration_of
from vllmc.core.declare.dims import Declared, dims_of
from vllmc.core.declare.examples import example_values
from vllmc.core.errors import UsageError
from vllmc.core.graph.layout import Argument, GraphInput, size_names
from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.capture import mark_dimension

# Distinct, and neither 0 nor 1, so that no two sizes are taken for one.
_TOKENS: Final = 17
_OTHERS: Final = (3, 5, 7, 11, 13, 19, 23, 29, 31, 37, 41, 43)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one call by name, and what of them is the same in every call like it.

    Those are the tensors but for sizes that vary, and the `constants`, by path. The first size
    that varies is the token count, which chooses the compile range.
    """

    values: Mapping[str, object]
    arguments: tuple[Argument, ...]
    constants: Mapping[str, JsonValue]

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the sizes that vary, the token count first."""
        return size_names(self.arguments)


def describe_call(declared: Declared, values: Mapping[str, object]) -> Call:
    """The call that brings `values`, by argument name.

    Raises `UsageError`: `bad-argument` for what is neither tensor nor constant nor holds such,
    `not-a-tensor` for a declared argument of constants alone, `bad-dims` and `dim-out-of-range`
    for declared dimensions that a tensor does not have.
    """
    tensors: list[Argument] = []
    constants: dict[str, JsonValue] = {}
    for name, value in values.items():
        held = tuple(leaves(name, value))
        if name in declared.dims and _is_no_tensor([leaf for _, leaf in held]):
            raise _not_a_tensor(name, value)
        for path, leaf in held:
            match leaf:
                case torch.Tensor():
                    tensors.append(_argument(declared, name, path, leaf))
                case None | bool() | int() | float() | str():
                    constants[path] = leaf
                case torch.dtype() | torch.device():
                    constants[path] = str(leaf)
                case _:
                    raise _bad_argument(path, leaf)
    return Call(values=values, arguments=tuple(tensors), constants=constants)


def example_call(name: str, entry: torch.nn.Module) -> Call:
    """The call of `entry` that its declaration gives an example of; `name` is for errors.

    Raises what `example_values` and `describe_call` raise.
    """
    declaration = declaration_of(entry)
    assert declaration is not None, f"{name} is no entry"
    return describe_call(declaration.declared, example_values(name, entry, declaration))


def _argument(declared: Declared, name: str, path: str, tensor: torch.Tensor) -> Argument:
    shape: list[int | str] = list(tensor.shape)
    for dim, dynamic in dims_of(declared, name, tensor).items():
        shape[dim] = dynamic.shape_id or f"{path}.shape[{dim}]"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Argument(path=path, dtype=dtype, shape=tuple(shape))


def _is_no_tensor(held: Sequence[object]) -> bool:
    constants = (bool, int, float, str)
    return any(isinstance(leaf, constants) for leaf in held) and not any(
        leaf is None or isinstance(leaf, torch.Tensor) for leaf in held
    )


def _not_a_tensor(name: str, value: object) -> UsageError:
    return UsageError(
        "not-a-tensor",
        f"the argument {name} is declared to have dimensions that vary, but its value, of type "
        f"{type(value).__qualname__}, holds no tensor",
        hint="pass a tensor, None, or tensors in a dict, list, tuple, dataclass or NamedTuple",
    )


def _bad_argument(path: str, value: object) -> UsageError:
    return UsageError(
        "bad-argument",
        f"the argument {path} is a {type(value).__name__}, which no compiled call can bring",
        hint="pass tensors, numbers and texts, in dicts, lists, tuples or dataclasses; what else "
        "the forward needs belongs to the module",
    )


def example_arguments(call: Call, spec: CompileSpec) -> dict[str, object]:
    """Arguments to capture `call` with: new tensors, whose varying sizes are marked as such.

    Only the token count is of the spec's kind. Every other size is unbacked in any case: a backed
    one would be taken for neither 0 nor 1.
    """
    described = {argument.path: argument for argument in call.arguments}
    numbers = dict(zip(call.sizes, (_TOKENS, *_OTHERS), strict=False))
    high = max(spec.max_tokens, _TOKENS)

    def example(path: str, _: torch.Tensor) -> torch.Tensor:
        argument = described[path]
        shape = [size if isinstance(size, int) else numbers[size] for size in argument.shape]
        made = torch.zeros(shape, dtype=getattr(torch, argument.dtype), device=spec.device)
        for dim, size in enumerate(argument.shape):
            if isinstance(size, str):
                kind = spec.dynamic_shapes if size == call.sizes[0] else "unbacked"
                mark_dimension(made, dim, kind=kind, shape_id=size, low=1, high=high)
        return made

    return {name: map_tensors(name, value, example) for name, value in call.values.items()}


def sizes_in(
    graph: fx.Graph, inputs: Sequence[GraphInput], call: Call
) -> tuple[tuple[str, sympy.Expr], ...]:
    """What capture took each varying size for, by the size's name, as often as the graph reads it.

    A symbol, or the number that capture fixed it to.
    """
    described = {argument.path: argument for argument in call.arguments}
    found = []
    for node, given in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        value = value_of(node)
        if given.kind == "activation" and isinstance(value, torch.Tensor):
            for name, size in zip(described[given.name].shape, value.shape, strict=True):
                if isinstance(name, str):
                    symbolic = isinstance(size, torch.SymInt)
                    found.append((name, size.node.expr if symbolic else sympy.Integer(size)))
    return tuple(found)


def role_of(size: str, call: Call) -> SymbolRole:
    """What the varying size called `size` plays for: the first one chooses the compile range."""
    return "tokens" if size == call.sizes[0] else "other"
