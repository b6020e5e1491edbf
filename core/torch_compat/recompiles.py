"""What Dynamo compiled again while a block ran, from its own compilation metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch._dynamo.utils as dynamo_utils

_LIMIT = 100_000
_LIMIT_HIT = "recompile limit exceeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompilation:
    """One recompile: the frame's file, line and function, Dynamo's reason, seconds it took.

    `limit_hit` says that Dynamo refused to compile the frame again, and ran it eager.
    """

    file: str
    line: int
    function: str
    reason: str
    seconds: float | None
    limit_hit: bool


@contextlib.contextmanager
def watch_recompiles() -> Iterator[list[Recompilation]]:
    """Yields a list that, when the block ends, holds every recompile that happened in it."""
    found: list[Recompilation] = []
    limit = dynamo_utils._compilation_metrics.maxlen
    dynamo_utils.set_compilation_metrics_limit(_LIMIT)
    before = len(dynamo_utils.get_compilation_metrics())
    try:
        yield found
    finally:
        every = dynamo_utils.get_compilation_metrics()
        # A refused compilation does not say whose it was.
        frames = {_frame_id(m): m for m in every if m.co_name}
        for metrics in every[before:]:
            if metrics.recompile_reason:
                frame = frames.get(_frame_id(metrics), metrics)
                limit_hit = _LIMIT_HIT in (metrics.fail_reason or "")
                found.append(
                    Recompilation(
                        file=frame.co_filename or "",
                        line=frame.co_firstlineno or 0,
                        function=frame.co_name or "",
                        reason=metrics.recompile_reason,
                        seconds=None if limit_hit else metrics.entire_frame_compile_time_s,
                        limit_hit=limit_hit,
                    )
                )
        # The oldest are dropped, as they would have been.
        dynamo_utils.set_compilation_metrics_limit(limit)


def _frame_id(metrics: dynamo_utils.CompilationMetrics) -> str:
    return (metrics.compile_id or "").rpartition("/")[0]
