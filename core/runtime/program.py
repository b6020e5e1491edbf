"""Linking: a layout, a model's tensors and loaded artifacts become a program that can be called.

Linking cannot tell an artifact that was just compiled from one that was stored: it is given
functions. Each tensor of the model is bound once, so that a call passes activations only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from vllmc.core.cache.key import JsonValue
from vllmc.core.errors import VllmcError
from vllmc.core.graph.inputs import find_attribute
from vllmc.core.graph.layout import GraphInput, Layout, OpStep, UnitStep
from vllmc.core.graph.targets import find_target
from vllmc.core.runtime.loader import PieceCallable
from vllmc.core.spec import CompileRange
from vllmc.kernels.layer_name import LayerName

Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

ACTIVATIONS = ("input_ids", "position_ids", "logits_indices")
_VALUE = re.compile(r"[pv]\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The functions of all unique pieces, in order, for one range of token counts."""

    range: CompileRange
    pieces: tuple[PieceCallable, ...]


class Program:
    """A compiled model: `program(input_ids, position_ids, logits_indices) -> logits`.

    Shapes `[1, T]`, `[1, T]`, `[B]` (int64) to `[B, vocab]`. `T` chooses the variant: a size
    beats a range.
    """

    def __init__(self, layout: Layout, steps: Sequence[tuple[CompileRange, Step]]) -> None:
        self.layout = layout
        self._sizes = {r.start: step for r, step in steps if r.is_size}
        self._ranges = tuple((r, step) for r, step in steps if not r.is_size)

    @property
    def ranges(self) -> tuple[CompileRange, ...]:
        """The token counts that the program accepts."""
        sizes = (CompileRange(size, size) for size in self._sizes)
        return tuple(sorted([*sizes, *(r for r, _ in self._ranges)]))

    @property
    def max_tokens(self) -> int:
        """The largest token count that some variant accepts."""
        return max(r.end for r in self.ranges)

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Raises `VllmcError` (`zero-tokens`, `size-out-of-range`, `bad-input`)."""
        # Compiled code reads memory as it was told to: what it is given is checked here.
        _check_input("input_ids", input_ids, 2)
        _check_input("position_ids", position_ids, 2)
        _check_input("logits_indices", logits_indices, 1)
        if input_ids.shape[0] != 1 or position_ids.shape != input_ids.shape:
            raise VllmcError(
                "bad-input",
                f"input_ids has the shape {list(input_ids.shape)} and position_ids "
                f"{list(position_ids.shape)}",
                hint="both have the shape [1, T]",
            )
        if logits_indices.shape[0] == 0:
            raise VllmcError(
                "bad-input",
                "no token's logits are asked for",
                hint="give at least one of the batch's tokens in logits_indices",
            )
        return self.variant(input_ids.shape[1])(input_ids, position_ids, logits_indices)

    def variant(self, tokens: int) -> Step:
        """The step that was compiled for `tokens`."""
        if (step := self._sizes.get(tokens)) is not None:
            return step
        for candidate, step in self._ranges:
            if tokens in candidate:
                return step
        if tokens == 0:
            raise VllmcError(
                "zero-tokens", "a batch of zero tokens cannot be run", hint="send at least one"
            )
        raise VllmcError(
            "size-out-of-range",
            f"no compiled range holds {tokens} tokens",
            context={"ranges": [str(r) for r in self.ranges]},
            hint=f"compile one that does: --compile-range 1:{max(tokens, self.max_tokens)}",
        )


def _check_input(name: str, tensor: torch.Tensor, dims: int) -> None:
    if tensor.dtype is torch.int64 and tensor.dim() == dims and tensor.is_contiguous():
        return
    raise VllmcError(
        "bad-input",
        f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with the "
        f"strides {list(tensor.stride())}",
        hint=f"it is a contiguous int64 tensor of {dims} dimension{'s' if dims > 1 else ''}",
    )


def link(layout: Layout, entry: torch.nn.Module, variants: Sequence[Variant]) -> Program:
    """Binds `layout` to the tensors of `entry` and to the functions of each variant.

    Raises `VllmcError` (`weights-mismatch`) where `entry` lacks a tensor or has it otherwise.
    """
    bound = {
        f"p{index}": _bind(entry, given)
        for index, given in enumerate(layout.inputs)
        if given.kind in {"attribute", "layer-name"}
    }
    targets: dict[str, object] = {}
    source = _step_source(layout, bound, targets)
    code = compile(source, "<vllmc program>", "exec")
    steps = []
    for variant in variants:
        pieces = {f"piece_{index}": piece for index, piece in enumerate(variant.pieces)}
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        steps.append((variant.range, namespace["bind"](**bound, **targets, **pieces)))
    return Program(layout, steps)


def _bind(entry: torch.nn.Module, given: GraphInput) -> object:
    if given.kind == "layer-name":
        return LayerName(given.name)
    try:
        found = find_attribute(entry, given.name)
    except KeyError:
        found = None
    if not isinstance(found, torch.Tensor):
        raise _mismatch(given, "it has none")
    dtype = str(found.dtype).removeprefix("torch.")
    strides = tuple(found.stride())
    if (dtype, tuple(found.shape), strides) != (given.dtype, given.shape, given.stride):
        raise _mismatch(given, f"it has {dtype} {list(found.shape)}, strides {list(strides)}")
    return found.detach()


def _mismatch(given: GraphInput, found: str) -> VllmcError:
    return VllmcError(
        "weights-mismatch",
        f"the program wants the tensor {given.name} as {given.dtype} {list(given.shape)}, "
        f"strides {list(given.stride)}: {found}",
        hint="compile for this model: vllmc warm --force",
    )


def _step_source(layout: Layout, bound: Mapping[str, object], targets: dict[str, object]) -> str:
    """Python source of `bind(...)`, which returns the step as a closure over what it is given."""
    lines = []
    for index, given in enumerate(layout.inputs):
        if given.kind == "activation":
            assert given.name in ACTIVATIONS
            lines.append(f"p{index} = {given.name}")
        elif given.kind == "size":
            assert given.name in ACTIVATIONS
            lines.append(f"p{index} = {given.name}.size({int(given.dim)})")
    last_use = _last_uses(layout)
    for number, step in enumerate(layout.steps):
        lines.append(_unit_line(step) if isinstance(step, UnitStep) else _op_line(step, targets))
        if dead := [name for name, use in last_use.items() if use == number and name not in bound]:
            lines.append(f"del {', '.join(dead)}")
    lines.append(f"return {_value(layout.output)}")
    pieces = {f"piece_{s.piece}" for s in layout.steps if isinstance(s, UnitStep)}
    arguments = ", ".join([*bound, *targets, *sorted(pieces)])
    body = "\n        ".join(lines)
    return (
        f"def bind({arguments}):\n"
        f"    def step({', '.join(ACTIVATIONS)}):\n"
        f"        {body}\n"
        f"    return step\n"
    )


def _unit_line(step: UnitStep) -> str:
    args = ", ".join(_value(name) for name in step.args)
    call = f"piece_{int(step.piece)}([{args}])"
    if not step.results:
        return call
    return f"{', '.join(_value(name) for name in step.results)}, = {call}"


def _op_line(step: OpStep, targets: dict[str, object]) -> str:
    parts = [_argument(a, targets) for a in step.args]
    parts += [f"{key}={_argument(value, targets)}" for key, value in step.kwargs.items()]
    kind, _, name = step.target.partition(":")
    if kind == "call_method":
        assert name.isidentifier()
        return f"{_value(step.result)} = {parts[0]}.{name}({', '.join(parts[1:])})"
    function = _constant(find_target(name), targets)
    return f"{_value(step.result)} = {function}({', '.join(parts)})"


def _argument(value: JsonValue, targets: dict[str, object]) -> str:
    if isinstance(value, dict):
        ((tag, content), *_) = value.items()
        if tag == "ref":
            return _value(str(content))
        if tag in {"list", "tuple"}:
            assert isinstance(content, list)
            inner = "".join(f"{_argument(v, targets)}, " for v in content)
            return f"[{inner}]" if tag == "list" else f"({inner})"
        if tag == "slice":
            assert isinstance(content, list)
            return f"slice({', '.join(_argument(v, targets) for v in content)})"
        return _constant(_decode(value), targets)
    return repr(value)


def _decode(value: Mapping[str, JsonValue]) -> object:
    match value:
        case {"float": str(text)}:
            return float.fromhex(text)
        case {"ellipsis": True}:
            return ...
        case {"torch": str(name), "of": "device"}:
            return torch.device(name)
        case {"torch": str(name)}:
            return getattr(torch, name)
    raise AssertionError(f"no argument is encoded as {value}")


def _constant(value: object, targets: dict[str, object]) -> str:
    name = f"c{len(targets)}"
    targets[name] = value
    return name


def _value(name: str) -> str:
    assert _VALUE.fullmatch(name), name
    return name


def _last_uses(layout: Layout) -> dict[str, int]:
    """The number of the step after which each value is no longer needed."""
    uses: dict[str, int] = {}
    for number, step in enumerate(layout.steps):
        if isinstance(step, UnitStep):
            names = (*step.args, *step.results)
        else:
            names = (*_references([*step.args, *step.kwargs.values()]), step.result)
        uses.update(dict.fromkeys(names, number))
    uses.pop(layout.output, None)
    return uses


def _references(value: JsonValue | list[JsonValue]) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    if isinstance(value, dict):
        if "ref" in value:
            return [str(value["ref"])]
        return [name for item in value.values() for name in _references(item)]
    return []
