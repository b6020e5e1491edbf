"""What a user asks to be compiled: the frozen value that every stage of the pipeline reads."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from vllmc.core.errors import UsageError
from vllmc.core.passes import PassChoice, default_passes
from vllmc.core.ranges import OPEN_END as OPEN_END
from vllmc.core.ranges import CompileRange as CompileRange

DynamicShapes: TypeAlias = Literal["unbacked", "backed", "backed-size-oblivious"]
LayerNames: TypeAlias = Literal["hoisted", "baked"]
ExpertsKind: TypeAlias = Literal["fused", "grouped_mm"]
Quantization: TypeAlias = Literal["fp8-static", "fp8-dynamic", "int8-dynamic"]
OptionValue: TypeAlias = "bool | int | float | str | list[OptionValue] | None"

ATTENTION_OP = "vllmc::unified_attention_with_output"
EXPERTS_OP = "vllmc::fused_moe"


def check_ranges(ranges: Sequence[CompileRange], sizes: Sequence[int]) -> None:
    """Raises `UsageError` unless `ranges` are disjoint and every size is at least 1."""
    if not ranges and not sizes:
        raise UsageError(
            "bad-range",
            "there is neither a compile range nor a compile size",
            hint="give at least one: --compile-range 1:8192",
        )
    ordered = sorted(ranges)
    for left, right in itertools.pairwise(ordered):
        if right.start <= left.end:
            raise UsageError(
                "overlapping-ranges",
                f"the compile ranges {left} and {right} overlap",
                context={"ranges": [str(r) for r in ordered]},
                hint=f"end the first before the second starts: {left.start}:{right.start - 1}",
            )
    for size in sizes:
        if size < 1:
            raise UsageError(
                "bad-size",
                f"the compile size {size} is below 1",
                hint="a compile size is a number of tokens, at least 1",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSpec:
    """Everything about a compilation that the user chooses, apart from the model.

    `device` is `cpu`, `cuda` or `cuda:N`; `dtype` a torch dtype's name without the prefix.
    With `split_kv_update` keys and values are stored by an op before attention, inside the piece.
    `quantize` says how the model's linears are quantised, None that they are not. `inductor` and
    `functorch` hold the `-O` options, `passes` those that run, sorted by name
    (None: the device's default ones).
    """

    device: str = "cpu"
    dtype: str = "float32"
    ranges: tuple[CompileRange, ...] = (CompileRange(1, 8192),)
    sizes: tuple[int, ...] = ()
    dynamic_shapes: DynamicShapes = "unbacked"
    layer_names: LayerNames = "hoisted"
    experts: ExpertsKind = "fused"
    splitting_ops: tuple[str, ...] = (ATTENTION_OP,)
    split_kv_update: bool = False
    quantize: Quantization | None = None
    inductor: tuple[tuple[str, OptionValue], ...] = ()
    functorch: tuple[tuple[str, OptionValue], ...] = ()
    passes: tuple[PassChoice, ...] | None = None
    backend: str = "inductor"

    def __post_init__(self) -> None:
        check_ranges(self.ranges, self.sizes)

    @property
    def chosen_passes(self) -> tuple[PassChoice, ...]:
        """The passes that run, sorted by name."""
        return default_passes(self.device) if self.passes is None else self.passes

    @property
    def max_tokens(self) -> int:
        """The largest token count that some range or size covers."""
        return max([r.end for r in self.ranges] + list(self.sizes))


def open_ended(spec: CompileSpec) -> CompileSpec:
    """`spec` with the last of its ranges without an end: for what cannot be cut into chunks."""
    if not spec.ranges:
        return spec
    *others, last = sorted(spec.ranges)
    return replace(spec, ranges=(*others, replace(last, end=OPEN_END)))


def unit_ranges(spec: CompileSpec) -> tuple[CompileRange, ...]:
    """The ranges to compile, sizes first: a size beats the range that holds it.

    A backed size is assumed to be neither 0 nor 1, so for `backed` shapes a range that starts at
    1 is compiled as the size 1 and the rest.
    """
    found = {CompileRange(size, size) for size in spec.sizes}
    for given in spec.ranges:
        if spec.dynamic_shapes == "backed" and given.start == 1 < given.end:
            found |= {CompileRange(1, 1), CompileRange(2, given.end)}
        else:
            found.add(given)
    return tuple(sorted(found, key=lambda r: (not r.is_size, r)))


def check_passes(spec: CompileSpec, names: Collection[str]) -> None:
    """Raises `UsageError` (`bad-range`) where a pass of `names` runs for none of the ranges."""
    ranges = unit_ranges(spec)
    for choice in spec.chosen_passes:
        if choice.name in names and not any(map(choice.applies_to, ranges)):
            raise UsageError(
                "bad-range",
                f"the pass {choice.name} would never run: no compile range lies within "
                f"{choice.tokens}",
                context={"ranges": list(map(str, ranges))},
                hint="--compile-range or --compile-size asks for one that does",
            )
