"""What a user asks to be compiled: the frozen value that every stage of the pipeline reads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from vllmc.core.errors import UsageError

DynamicShapes: TypeAlias = Literal["unbacked", "backed", "backed-size-oblivious"]
LayerNames: TypeAlias = Literal["hoisted", "baked"]
Quantization: TypeAlias = Literal["fp8-static", "fp8-dynamic", "int8-dynamic"]
OptionValue: TypeAlias = "bool | int | float | str | list[OptionValue] | None"

OPEN_END: Final = 2**31 - 1
"""The end of a range without one, written `inf`; as far as torch's smaller indices reach."""

ATTENTION_OP = "vllmc::unified_attention_with_output"


@dataclass(frozen=True, slots=True, order=True)
class CompileRange:
    """An inclusive range of token counts. A range of one count is a compile size."""

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> CompileRange:
        """Reads `A:B`, `N` for `N:N`, or `A:inf`. Raises `UsageError` for anything else."""
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+|inf)\s*)?", text)
        if match is None:
            raise UsageError(
                "bad-range",
                f"'{text}' is not a range of token counts",
                hint="write it as A:B, both inclusive, for example --compile-range 1:8192",
            )
        start = int(match[1])
        end = start if match[2] is None else OPEN_END if match[2] == "inf" else int(match[2])
        if start < 1:
            raise UsageError(
                "bad-range",
                f"the range {text} starts below 1: a batch of zero tokens is never run",
                hint=f"start it at 1: --compile-range 1:{max(end, 1)}",
            )
        if end < start:
            raise UsageError(
                "bad-range",
                f"the range {text} is empty: its end lies below its start",
                hint=f"did you mean {end}:{start}?",
            )
        return cls(start, end)

    @property
    def is_size(self) -> bool:
        """Whether the range holds a single token count."""
        return self.start == self.end

    @property
    def tokens(self) -> str:
        """The range in words: `1 token`, `2:64 tokens`."""
        return f"{self} token{'' if self == CompileRange(1, 1) else 's'}"

    def __contains__(self, tokens: object) -> bool:
        return isinstance(tokens, int) and self.start <= tokens <= self.end

    def __str__(self) -> str:
        if self.is_size:
            return str(self.start)
        return f"{self.start}:{'inf' if self.end == OPEN_END else self.end}"


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
    `quantize` says how the model's linears are quantised, None that they are not. `inductor` and
    `functorch` hold the `-O` options, sorted by name.
    """

    device: str = "cpu"
    dtype: str = "float32"
    ranges: tuple[CompileRange, ...] = (CompileRange(1, 8192),)
    sizes: tuple[int, ...] = ()
    dynamic_shapes: DynamicShapes = "unbacked"
    layer_names: LayerNames = "hoisted"
    splitting_ops: tuple[str, ...] = (ATTENTION_OP,)
    quantize: Quantization | None = None
    inductor: tuple[tuple[str, OptionValue], ...] = ()
    functorch: tuple[tuple[str, OptionValue], ...] = ()
    backend: str = "inductor"

    def __post_init__(self) -> None:
        check_ranges(self.ranges, self.sizes)

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
