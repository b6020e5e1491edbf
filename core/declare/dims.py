"""The dimensions of a forward's tensors that vary from call to call, as its author declares them.

    support_torch_compile(dynamic_arg_dims={"x": 0, "hidden": {0: "tokens"}, "mask": [-2, -1]})

A dimension declared for an argument that holds several tensors is one of each of them.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import torch

from vllmc.core.declare.annotations import holds_tensors
from vllmc.core.errors import UsageError

Dims: TypeAlias = int | list[int] | tuple[int, ...] | Mapping[int, str]
"""Dimensions of one argument: one, several, or each with its shape id."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicDim:
    """A dimension, perhaps counted from the last, whose size varies.

    Dimensions with one `shape_id` have one size; without an id a dimension stands for itself.
    `unbacked` dimensions are so whatever the spec says of the others.
    """

    dim: int
    shape_id: str | None = None
    unbacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """The dimensions that vary, by argument, in the order of the signature.

    `inferred` says that they come from annotations. Sizes of the shape ids `at_most_tokens` never
    exceed the token count.
    """

    dims: Mapping[str, tuple[DynamicDim, ...]]
    inferred: bool
    at_most_tokens: frozenset[str] = frozenset()


def declare(
    forward: Callable[..., object],
    dynamic_arg_dims: Mapping[str, Dims] | None = None,
    mark_unbacked_dims: Mapping[str, Dims] | None = None,
    at_most_tokens: Iterable[str] = (),
) -> Declared:
    """Reads what a class declares of the arguments of its `forward`.

    Without `dynamic_arg_dims` the first dimension of every argument annotated as a tensor, or as
    something that holds tensors, varies. The dimensions of `mark_unbacked_dims` vary too.

    Raises `UsageError` for what cannot be meant (`unknown-argument`, `bad-dims`,
    `no-dynamic-dims`).
    """
    parameters = _parameters(forward)
    if dynamic_arg_dims is None:
        dynamic = _inferred(forward, parameters)
    else:
        dynamic = _read("dynamic_arg_dims", dynamic_arg_dims, unbacked=False)
    unbacked = _read("mark_unbacked_dims", mark_unbacked_dims or {}, unbacked=True)
    for name in (*dynamic, *unbacked):
        _check_argument(name, forward, parameters)
    dims = {
        name: _merged(name, dynamic.get(name, ()), unbacked.get(name, ()))
        for name in parameters
        if name in dynamic or name in unbacked
    }
    if not dims:
        raise _undeclared(forward, parameters)
    ids = {dim.shape_id for given in dims.values() for dim in given}
    bounded = frozenset(at_most_tokens)
    if strange := sorted(bounded - ids):
        raise UsageError(
            "bad-dims",
            f"at_most_tokens names '{strange[0]}', which is the shape id of no dimension",
            hint=f"the shape ids are {', '.join(sorted(filter(None, ids))) or 'none'}",
        )
    return Declared(
        dims=MappingProxyType(dims), inferred=dynamic_arg_dims is None, at_most_tokens=bounded
    )


def dims_of(declared: Declared, name: str, tensor: torch.Tensor) -> dict[int, DynamicDim]:
    """The dimensions that vary of a tensor in the argument `name`, counted from the first.

    None are inferred for a tensor without dimensions. Raises `UsageError` where one declared is not
    there (`dim-out-of-range`), or two are one (`bad-dims`).
    """
    found: dict[int, DynamicDim] = {}
    for declaration in declared.dims.get(name, ()):
        if not tensor.ndim and declared.inferred and not declaration.unbacked:
            continue
        if not -tensor.ndim <= declaration.dim < tensor.ndim:
            raise UsageError(
                "dim-out-of-range",
                f"dimension {declaration.dim} of argument '{name}' is declared to vary, but there "
                f"is a tensor of rank {tensor.ndim}, of shape {list(tensor.shape)}",
            )
        dim = declaration.dim % tensor.ndim
        _add(found, replace(declaration, dim=dim), f"of argument '{name}'")
    return found


def _parameters(forward: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The parameters that can be declared: not the module itself, nor those that collect others."""
    found = inspect.signature(forward).parameters
    return {
        name: parameter
        for index, (name, parameter) in enumerate(found.items())
        if parameter.kind not in _VARIADIC and (index, name) != (0, "self")
    }


def forward_parameters(module: torch.nn.Module) -> tuple[inspect.Parameter, ...]:
    """The parameters of the module's forward that a call can bring."""
    return tuple(_parameters(type(module).forward).values())


def _inferred(
    forward: Callable[..., object], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, tuple[DynamicDim, ...]]:
    namespace = getattr(inspect.unwrap(forward), "__globals__", {})
    return {
        name: (DynamicDim(dim=0),)
        for name, parameter in parameters.items()
        if holds_tensors(parameter.annotation, namespace)
    }


def _read(
    option: str, given: Mapping[str, Dims], *, unbacked: bool
) -> dict[str, tuple[DynamicDim, ...]]:
    if not isinstance(given, Mapping):
        raise _bad_dims(f"{option} is {given!r}, which is no mapping from arguments to dimensions")
    found: dict[str, tuple[DynamicDim, ...]] = {}
    for name, dims in given.items():
        where = f"of argument '{name}' in {option}"
        declarations: dict[int, DynamicDim] = {}
        for dim, shape_id in _pairs(dims, where):
            if not isinstance(dim, int) or isinstance(dim, bool):
                raise _bad_dims(f"{dim!r} is given for a dimension {where}")
            _add(declarations, DynamicDim(dim=dim, shape_id=shape_id, unbacked=unbacked), where)
        if not declarations:
            raise _bad_dims(f"no dimension {where} is given")
        found[name] = tuple(declarations.values())
    return found


def _pairs(dims: Dims, where: str) -> Iterator[tuple[int, str | None]]:
    if isinstance(dims, Mapping):
        for dim, shape_id in dims.items():
            if not isinstance(shape_id, str) or not shape_id.strip():
                raise _bad_dims(
                    f"{shape_id!r} is given for the shape id of dimension {dim} {where}"
                )
            yield dim, shape_id
    else:
        for dim in dims if isinstance(dims, (list, tuple)) else (dims,):
            yield dim, None


def _merged(
    name: str, dynamic: tuple[DynamicDim, ...], unbacked: tuple[DynamicDim, ...]
) -> tuple[DynamicDim, ...]:
    found: dict[int, DynamicDim] = {}
    for declaration in (*dynamic, *unbacked):
        _add(found, declaration, f"of argument '{name}'")
    return tuple(found.values())


def _add(found: dict[int, DynamicDim], declaration: DynamicDim, where: str) -> None:
    """Adds a declaration, or joins it with that of the same dimension from the other option."""
    dim = declaration.dim
    if (known := found.get(dim)) is not None:
        if known.unbacked == declaration.unbacked:
            raise _bad_dims(f"dimension {dim} {where} is declared twice")
        ids = {known.shape_id, declaration.shape_id} - {None}
        if len(ids) > 1:
            raise _bad_dims(
                f"dimension {dim} {where} has two shape ids, "
                f"'{known.shape_id}' and '{declaration.shape_id}'"
            )
        declaration = DynamicDim(dim=dim, shape_id=next(iter(ids), None), unbacked=True)
    found[dim] = declaration


def _bad_dims(message: str) -> UsageError:
    return UsageError(
        "bad-dims",
        message,
        hint='give one dimension, several, or each with its shape id: 0, [0, 1], {0: "tokens"}',
    )


def _check_argument(
    name: str, forward: Callable[..., object], parameters: Mapping[str, inspect.Parameter]
) -> None:
    if name in parameters:
        return
    near = difflib.get_close_matches(str(name), parameters, n=1)
    hint = f"did you mean '{near[0]}'?" if near else ""
    if name in inspect.signature(forward).parameters:
        hint = (
            f"'{name}' is the module itself, or collects arguments that have no name of their own"
        )
    raise UsageError(
        "unknown-argument",
        f"'{name}' is no argument of {_named(forward)} whose dimensions can be declared; "
        f"there are {', '.join(parameters) or 'none'}",
        context={"arguments": list(parameters)},
        hint=hint,
    )


def _undeclared(
    forward: Callable[..., object], parameters: Mapping[str, inspect.Parameter]
) -> UsageError:
    if not parameters:
        hint = "name the tensors among its arguments"
    else:
        hint = f"declare them: dynamic_arg_dims={_spelled({next(iter(parameters)): [0]})}"
    return UsageError(
        "no-dynamic-dims",
        f"no argument of {_named(forward)} is annotated as a tensor, and no dimension is declared",
        hint=hint,
    )


def _spelled(dims: Mapping[str, list[int]]) -> str:
    """As it is pasted into a program."""
    return json.dumps(
        {name: given[0] if len(given) == 1 else given for name, given in dims.items()}
    )


def _named(forward: Callable[..., object]) -> str:
    return forward.__qualname__.rpartition("<locals>.")[2]
