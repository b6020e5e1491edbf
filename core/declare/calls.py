"""A call of a module: its tensors with sizes that vary, and its other arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllmc.core.cache.key import JsonValue
from vllmc.core.declare.containers import containers, leaves
from vllmc.core.declare.declaration import declaration_of
from vllmc.core.declare.dims import Declared, dims_of
from vllmc.core.errors import UsageError
from vllmc.core.graph.layout import Argument, size_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one call by name, and what of them is the same in every call like it.

    Those are the tensors but for sizes that vary, and the `constants` by path, among them the
    classes of containers. The first size that varies is the token count, which chooses the compile
    range; `unbacked` are the sizes that are declared to be so whatever the spec's kind, `bounded`
    those that never exceed the token count.
    """

    values: Mapping[str, object]
    arguments: tuple[Argument, ...]
    constants: Mapping[str, JsonValue]
    unbacked: frozenset[str] = frozenset()
    bounded: frozenset[str] = frozenset()

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
    unbacked: set[str] = set()
    constants: dict[str, JsonValue] = {}
    for name, value in values.items():
        held = tuple(leaves(name, value))
        if name in declared.dims and _is_no_tensor([leaf for _, leaf in held]):
            raise _not_a_tensor(name, value)
        for path, kind in containers(name, value):
            constants[f"type({path})"] = f"{kind.__module__}.{kind.__qualname__}"
        for path, leaf in held:
            match leaf:
                case torch.Tensor():
                    sizes = _sizes(declared, name, path, leaf)
                    tensors.append(_argument(path, leaf, sizes))
                    unbacked |= {size for size, always in sizes.values() if always}
                case None | bool() | int() | float() | str():
                    constants[path] = leaf
                case torch.dtype() | torch.device():
                    constants[path] = str(leaf)
                case _:
                    raise bad_argument(path, leaf)
    return Call(
        values=values,
        arguments=tuple(tensors),
        constants=constants,
        unbacked=frozenset(unbacked),
        bounded=declared.at_most_tokens.intersection(size_names(tensors)),
    )


def example_call(name: str, entry: torch.nn.Module) -> Call:
    """The call of `entry` that its declaration gives an example of; `name` is for errors.

    Raises what `example_values` and `describe_call` raise.
    """
    # Who has a call to describe does without fake tensors, which bring SymPy along: a second.
    from vllmc.core.declare.examples import example_values

    declaration = declaration_of(entry)
    assert declaration is not None, f"{name} is no entry"
    return describe_call(declaration.declared, example_values(name, entry, declaration))


def _sizes(
    declared: Declared, name: str, path: str, tensor: torch.Tensor
) -> dict[int, tuple[str, bool]]:
    """The sizes of the tensor that vary, by dimension: their names, and if they are unbacked."""
    return {
        dim: (dynamic.shape_id or f"{path}.shape[{dim}]", dynamic.unbacked)
        for dim, dynamic in dims_of(declared, name, tensor).items()
    }


def _argument(path: str, tensor: torch.Tensor, sizes: Mapping[int, tuple[str, bool]]) -> Argument:
    shape: list[int | str] = list(tensor.shape)
    for dim, (size, _) in sizes.items():
        shape[dim] = size
    return Argument(path=path, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(shape))


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


def bad_argument(path: str, value: object) -> UsageError:
    """Says that what `path` reads is of no kind that a call can bring."""
    return UsageError(
        "bad-argument",
        f"the argument {path} is a {type(value).__name__}, which no compiled call can bring",
        hint="pass tensors, numbers and texts, in dicts, lists, tuples or dataclasses; what else "
        "the forward needs belongs to the module",
    )
