"""What Dynamo compiled again while a block ran, from its own compilation metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch._dynamo.utils as dynamo_utils

_LIMIT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompilation:
    """One recompile: the frame's file, line and function, Dynamo's reason, seconds it took."""

    file: str
    line: int
    function: str
    reason: str
    seconds: float | None


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
        for metrics in dynamo_utils.get_compilation_metrics()[before:]:
            if metrics.recompile_reason:
                found.append(
                    Recompilation(
                        file=metrics.co_filename or "",
                        line=metrics.co_firstlineno or 0,
                        function=metrics.co_name or "",
                        reason=metrics.recompile_reason,
                        seconds=metrics.entire_frame_compile_time_s,
                    )
                )
        # The oldest are dropped, as they would have been.
        dynamo_utils.set_compilation_metrics_limit(limit)
