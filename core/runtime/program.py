"""Linking: a layout, a model's tensors and loaded artifacts become a program that can be called.

Linking cannot tell an artifact that was just compiled from one that was stored: it is given
functions. Each tensor of the model is bound once, so that a call passes activations only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from vllmc.core.cache.key import JsonValue
from vllmc.core.cache.usage import Hold
from vllmc.core.errors import VllmcError
from vllmc.core.graph.inputs import find_attribute
from vllmc.core.graph.layout import ExpertsSite, GraphInput, Layout, OpStep, UnitStep
from vllmc.core.graph.literals import decode_constant
from vllmc.core.graph.targets import find_target, import_by_name
from vllmc.core.models.expert_modules import experts_of, has_experts
from vllmc.core.runtime.arguments import ArgumentCheck
from vllmc.core.runtime.cuda_graphs import CudaGraphs
from vllmc.core.runtime.linked import Linked, Step, Unit
from vllmc.core.runtime.loader import BoundPiece, PieceCallable, bind_piece
from vllmc.core.spec import CompileRange
from vllmc.kernels.attention import past_dispatcher
from vllmc.kernels.experts import Experts
from vllmc.kernels.layer_name import LayerName

Guards: TypeAlias = Callable[[Sequence[int]], None]
"""Takes the sizes that vary, in the order of `Layout.sizes`."""

_VALUE = re.compile(r"[apv]\d+")
# How the error begins that compiled code raises of what it is given.
_OTHER_STRIDES = "expected size "


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The functions of all unique pieces, in order, for one range of token counts."""

    range: CompileRange
    pieces: tuple[PieceCallable, ...]


class Program:
    """A compiled module: called with the tensors of `layout.arguments`, in their order.

    Returns what the module does. The token count, the first of the sizes that vary, chooses the
    variant: a size beats a range. Where nothing varies there is one variant. `guards` is called
    with the sizes that vary before each call that runs. `experts` are those that its ops look for,
    by layer name: the forward context of a call must hold them. With `graphs` some calls replay
    CUDA graphs; a program then runs one call at a time. `hold` keeps what it was made of in the
    cache.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device | None,
        steps: Sequence[tuple[CompileRange, Linked]],
        guards: Guards | None = None,
        experts: Mapping[str, Experts] = MappingProxyType({}),
        graphs: CudaGraphs | None = None,
    ) -> None:
        self.layout = layout
        self.experts = experts
        self.graphs = graphs
        self.hold: Hold | None = None
        self._check = ArgumentCheck(layout, device)
        self._guards = guards
        self._static = steps[0][1] if not layout.sizes else None
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

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """Raises `VllmcError`: what `ArgumentCheck` and `variant` raise, and `other-layout`."""
        # Compiled code reads memory as it was told to: what it is given is checked here.
        sizes = self._check(arguments)
        linked = self._static or self._variant(sizes[0])
        if self._guards is not None:
            self._guards(sizes)
        step = linked.step if self.graphs is None else self.graphs.step(sizes, linked)
        try:
            return step(*arguments)
        except AssertionError as error:
            if not str(error).startswith(_OTHER_STRIDES):
                raise
            raise VllmcError(
                "other-layout",
                "a piece was given a tensor that lies otherwise in memory than it was compiled for",
                context={"cause": str(error)},
                hint="call contiguous() on what the model slices or expands before the op that the "
                "graph is cut at",
            ) from error

    def variant(self, tokens: int) -> Step:
        """The step that was compiled for `tokens`.

        Raises `VllmcError`: `zero-tokens`, `size-out-of-range`, `ambiguous-size`.
        """
        return self._variant(tokens).step

    def _variant(self, tokens: int) -> Linked:
        if (step := self._sizes.get(tokens)) is not None:
            return step
        candidates = [(given, step) for given, step in self._ranges if tokens in given]
        if len(candidates) == 1:
            return candidates[0][1]
        if tokens == 0:
            raise VllmcError(
                "zero-tokens", "a batch of zero tokens cannot be run", hint="send at least one"
            )
        if candidates:
            raise VllmcError(
                "ambiguous-size",
                f"{len(candidates)} compiled ranges hold {tokens} tokens",
                context={"ranges": [str(r) for r, _ in candidates]},
                hint="compile it again: vllmc warm --force",
            )
        raise VllmcError(
            "size-out-of-range",
            f"no compiled range holds {tokens} tokens",
            context={"ranges": [str(r) for r in self.ranges]},
            hint="compile one that does: --compile-range "
            f"{CompileRange(1, max(tokens, self.max_tokens))}",
        )


def link(
    layout: Layout,
    entry: torch.nn.Module,
    variants: Sequence[Variant],
    guards: Guards | None = None,
    graphs: CudaGraphs | None = None,
) -> Program:
    """Binds `layout` to the tensors of `entry` and to the functions of each variant.

    Raises `VllmcError` (`weights-mismatch`) where `entry` lacks a tensor or has it otherwise.
    """
    experts = {site.layer: _experts(entry, site) for site in layout.experts}
    bound = {
        f"p{index}": _bind(entry, given)
        for index, given in enumerate(layout.inputs)
        if given.kind in {"attribute", "layer-name"}
    }
    device = next((t.device for t in bound.values() if isinstance(t, torch.Tensor)), None)
    bind = _binder(layout, bound, copying=False)
    steps = []
    for variant in variants:
        units = _units(layout, bound, variant)
        step = bind({name: unit.call for name, unit in units.items()})
        rebind = partial(_rebind, layout, bound)
        steps.append((variant.range, Linked(step=step, units=units, rebind=rebind)))
    return Program(layout, device, steps, guards, experts, graphs)


def _rebind(layout: Layout, bound: Mapping[str, object], units: Mapping[str, BoundPiece]) -> Step:
    return _binder(layout, bound, copying=True)(units)


def _binder(
    layout: Layout, bound: Mapping[str, object], *, copying: bool
) -> Callable[[Mapping[str, BoundPiece]], Step]:
    """A function from those of the unit steps, by name, to a step; `copying` its results."""
    targets: dict[str, object] = {}
    code = compile(_step_source(layout, bound, targets, copying), "<vllmc program>", "exec")

    def bind(units: Mapping[str, BoundPiece]) -> Step:
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        step: Step = namespace["bind"](**bound, **targets, **units)
        return step

    return bind


def _units(layout: Layout, bound: Mapping[str, object], variant: Variant) -> dict[str, Unit]:
    """The function of each unit step, by name: a step's own, which has its layer's parameters."""
    return {
        f"unit_{number}": Unit(
            piece=step.piece,
            call=bind_piece(
                variant.pieces[step.piece],
                len(step.args),
                {place: bound[name] for place, name in enumerate(step.args) if name in bound},
            ),
        )
        for number, step in enumerate(layout.steps)
        if isinstance(step, UnitStep)
    }


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


def _experts(entry: torch.nn.Module, site: ExpertsSite) -> Experts:
    for tensor in site.tensors:
        _bind(entry, tensor)
    module = find_attribute(entry, site.layer)
    if not has_experts(module):
        raise _mismatch(site.tensors[0], "the module there holds no experts")
    assert isinstance(module, torch.nn.Module)
    return experts_of(module)


def _mismatch(given: GraphInput, found: str) -> VllmcError:
    return VllmcError(
        "weights-mismatch",
        f"the program wants the tensor {given.name} as {given.dtype} {list(given.shape)}, "
        f"strides {list(given.stride)}: {found}",
        hint="compile for this model: vllmc warm --force",
    )


def _step_source(
    layout: Layout, bound: Mapping[str, object], targets: dict[str, object], copying: bool
) -> str:
    """Python source of `bind(...)`, which returns the step as a closure over what it is given."""
    places = {argument.path: f"a{index}" for index, argument in enumerate(layout.arguments)}
    lines = []
    for index, given in enumerate(layout.inputs):
        if given.kind == "activation":
            lines.append(f"p{index} = {places[given.name]}")
        elif given.kind == "size":
            lines.append(f"p{index} = {places[given.name]}.size({int(given.dim)})")
    dead: dict[int, list[str]] = defaultdict(list)
    for name, use in _last_uses(layout).items():
        if name not in bound:
            dead[use].append(name)
    for number, step in enumerate(layout.steps):
        if isinstance(step, UnitStep):
            lines.append(_unit_line(number, step, bound))
        else:
            lines.append(_op_line(step, targets))
        if number in dead:
            lines.append(f"del {', '.join(dead[number])}")
    if copying:
        copied = _constant(_copied, targets)
        results = dict.fromkeys(_references(layout.result))
        lines += [f"{_value(name)} = {copied}({name})" for name in results]
    lines.append(f"return {_argument(layout.result, targets)}")
    units = [f"unit_{n}" for n, step in enumerate(layout.steps) if isinstance(step, UnitStep)]
    arguments = ", ".join([*bound, *targets, *units])
    body = "\n        ".join(lines)
    return (
        f"def bind({arguments}):\n"
        f"    def step({', '.join(places.values())}):\n"
        f"        {body}\n"
        f"    return step\n"
    )


def _unit_line(number: int, step: UnitStep, bound: Mapping[str, object]) -> str:
    args = ", ".join(_value(name) for name in step.args if name not in bound)
    call = f"unit_{number}({args})"
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
    function = _constant(past_dispatcher(find_target(name)), targets)
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
        if tag == "dict":
            assert isinstance(content, list)
            pairs = "".join(f"{_argument({'tuple': pair}, targets)}, " for pair in content)
            return f"dict([{pairs}])"
        if tag in {"call", "object"}:
            return _object(value, targets)
        if tag == "slice":
            assert isinstance(content, list)
            return f"slice({', '.join(_argument(v, targets) for v in content)})"
        return _constant(decode_constant(value), targets)
    return repr(value)


def _object(value: Mapping[str, Any], targets: dict[str, object]) -> str:
    """An object of what a forward returns: its class called, or given its attributes."""
    module, name = value.get("call") or value["object"]
    try:
        cls = import_by_name(module, name)
    except (ImportError, AttributeError) as error:
        raise VllmcError(
            "unknown-class",
            f"the program returns a {module}.{name}, which this process cannot import",
            context={"cause": str(error)},
            hint="install the version of the package that the program was compiled with",
        ) from error
    if "object" in value:
        held = ", ".join(f"{k!r}: {_argument(v, targets)}" for k, v in value["state"])
        return f"{_constant(partial(_with_attributes, cls), targets)}({{{held}}})"
    parts = [_argument(v, targets) for v in value.get("args", ())]
    parts += [f"{k}={_argument(v, targets)}" for k, v in value.get("kwargs", ())]
    return f"{_constant(cls, targets)}({', '.join(parts)})"


def _with_attributes(cls: Any, attributes: Mapping[str, object]) -> object:
    made = cls.__new__(cls)
    vars(made).update(attributes)
    return made


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value


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
    for name in _references(layout.result):
        uses.pop(name, None)
    return uses


def _references(value: JsonValue | list[JsonValue]) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    if isinstance(value, dict):
        if "ref" in value:
            return [str(value["ref"])]
        return [name for item in value.values() for name in _references(item)]
    return []
