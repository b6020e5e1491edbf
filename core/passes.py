"""The passes that there are, by name. Imports no torch.

A pass works in one of two places: on the captured graph, before it is cut, or on a piece as
Inductor is about to lower it, functionalised and decomposed (its post-grad point).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from vllmc.core.errors import UsageError
from vllmc.core.ranges import CompileRange

Stage: TypeAlias = Literal["captured", "post-grad"]

ALL: Final = "all"
"""Stands for every pass where passes are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInfo:
    """What is known of a pass without importing it.

    `devices` are those on which it runs unless something else is asked for. `version` is raised
    when what it does changes. `module` is the file in `core/graph/passes` that says how it does it,
    by whose digest a pass is told from another of its name and version.
    """

    name: str
    stage: Stage
    version: int
    module: str
    does: str
    devices: tuple[str, ...] = ("cpu", "cuda")


PASSES: Final[Mapping[str, PassInfo]] = MappingProxyType(
    {
        info.name: info
        for info in (
            PassInfo(
                name="shared-quant",
                stage="captured",
                version=1,
                module="shared",
                does="a tensor that is quantised in the same way several times is so once",
            ),
            PassInfo(
                name="attention-quant",
                stage="captured",
                version=1,
                module="attention",
                does="attention writes its output quantised, where nothing else reads it",
            ),
            PassInfo(
                name="no-ops",
                stage="post-grad",
                version=1,
                module="no_ops",
                does="drops what changes nothing: factors of one, slices of the whole",
            ),
            PassInfo(
                name="norm-quant",
                stage="post-grad",
                version=1,
                module="fusions",
                does="RMSNorm and the quantisation after it are one op, with the addition of the "
                "residual before it where there is one",
                devices=("cuda",),
            ),
            PassInfo(
                name="activation-quant",
                stage="post-grad",
                version=1,
                module="fusions",
                does="a gated SiLU or GELU and the quantisation after it are one op",
                devices=("cuda",),
            ),
            PassInfo(
                name="expand-quant",
                stage="post-grad",
                version=1,
                module="expanded",
                does="quantisation that is left becomes part of the loops that Inductor writes",
                devices=("cpu",),
            ),
        )
    }
)
"""Every pass by its name, in the order in which they run."""


@dataclass(frozen=True, slots=True, order=True)
class PassChoice:
    """A pass that is to run: everywhere, or only for compile ranges within `tokens`.

    Written as `NAME` or `NAME@A:B`.
    """

    name: str
    tokens: CompileRange | None = None

    @classmethod
    def parse(cls, text: str) -> PassChoice:
        """Reads `NAME` or `NAME@A:B`. Raises `UsageError` (`unknown-pass`, `bad-range`)."""
        name, at, tokens = text.strip().partition("@")
        if name not in PASSES:
            near = difflib.get_close_matches(name, PASSES, n=1)
            raise UsageError(
                "unknown-pass",
                f"there is no pass '{name}'",
                context={"passes": list(PASSES)},
                hint=f"did you mean {near[0]}?" if near else f"there are {', '.join(PASSES)}",
            )
        if at and PASSES[name].stage == "captured":
            raise UsageError(
                "bad-range",
                f"the pass {name} rewrites the captured graph, which all ranges share",
                hint=f"write --pass {name}, without a range",
            )
        return cls(name, CompileRange.parse(tokens) if at else None)

    def applies_to(self, compiled: CompileRange | None) -> bool:
        """Whether it runs for a unit of the range `compiled`; None where it serves any range."""
        if self.tokens is None:
            return True
        within = self.tokens
        return compiled is not None and within.start <= compiled.start <= compiled.end <= within.end

    def __str__(self) -> str:
        if self.tokens is None:
            return self.name
        return f"{self.name}@{self.tokens.start}:{str(self.tokens).rpartition(':')[2]}"


def default_passes(device: str) -> tuple[PassChoice, ...]:
    """Those that run on `device` (`cpu`, `cuda:0`) unless something else is asked for, by name."""
    kind = device.partition(":")[0]
    return tuple(PassChoice(n) for n, info in sorted(PASSES.items()) if kind in info.devices)


def chosen(added: Iterable[str], removed: Iterable[str], device: str) -> tuple[PassChoice, ...]:
    """The passes to run on `device`: its default ones without those `removed`, and those `added`.

    `all` stands for every pass that is not named, in both, and what is added is not removed. Raises
    what `PassChoice.parse` raises, and `UsageError` (`bad-range`) for a pass with two ranges.
    """
    added, removed = frozenset(added), frozenset(removed)
    found = {} if ALL in removed else {c.name: c for c in default_passes(device)}
    if ALL in added:
        found = {name: PassChoice(name) for name in PASSES}
    found = {name: choice for name, choice in found.items() if name not in removed}
    named: dict[str, PassChoice] = {}
    for choice in sorted(map(PassChoice.parse, added - {ALL}), key=str):
        if (other := named.setdefault(choice.name, choice)) != choice:
            raise UsageError(
                "bad-range",
                f"the pass {choice.name} is to run as {other} and as {choice}",
                hint="name it once, with a range that holds all the compile ranges it is for",
            )
    return tuple(sorted((found | named).values()))
