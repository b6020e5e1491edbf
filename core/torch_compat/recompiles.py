"""What Dynamo compiles while a block runs, from the records of its structured trace.

Torch makes these records, those of `TORCH_TRACE`, where the logger `torch.__trace` has a handler.
A handler more changes nothing for the others, prints nothing, and needs no setting of torch's.
Source: `trace_structured` in torch/_logging/_internal.py, torch 2.13. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

_LOGGER: Final = "torch.__trace"
_REASONS: Final = "recompile_reasons"
_BREAK: Final = "dynamo_graph_break_reason"
_REFUSED: Final = "recompile limit exceeded"
_REFUSED_WHOLE_GRAPH: Final = "FailOnRecompileLimitHit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompilation:
    """One recompile: the frame's file, first line and function, and what it cost.

    `reasons` are Dynamo's, one for each earlier compilation (`0/1: ...`). `seconds` is None while
    it lasts, and with `limit_hit`: Dynamo refused to compile the frame again.
    """

    file: str
    line: int
    function: str
    reasons: tuple[str, ...]
    seconds: float | None = None
    limit_hit: bool = False


class Compilations(logging.Handler):
    """What was compiled in this process, by any thread, since the handler was added.

    Recompiles are in the order in which they began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recompilations: list[Recompilation] = []
        self.graph_breaks = 0
        self.first_compilations = 0
        self._open: dict[tuple[Any, ...], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Takes in one record of the trace."""
        found: Mapping[str, Any] = record.__dict__["metadata"]
        identity = tuple(
            found.get(part) for part in ("compiled_autograd_id", "frame_id", "frame_compile_id")
        )
        if "dynamo_start" in found:
            self.first_compilations += found.get("frame_compile_id") == 0
        elif metrics := found.get("compilation_metrics"):
            if (place := self._open.pop(identity, None)) is not None:
                self.recompilations[place] = _ended(self.recompilations[place], metrics)
        elif artifact := found.get("artifact"):
            self.graph_breaks += artifact.get("name") == _BREAK
            if artifact.get("name") == _REASONS:
                self._open[identity] = len(self.recompilations)
                self.recompilations.append(_begun(record.__dict__["payload"]))


@contextlib.contextmanager
def watch_compilations() -> Iterator[Compilations]:
    """Yields what is compiled while the block runs; it grows as it happens."""
    compilations = Compilations()
    logger = logging.getLogger(_LOGGER)
    logger.addHandler(compilations)
    try:
        yield compilations
    finally:
        logger.removeHandler(compilations)
        compilations.close()


def _begun(payload: str) -> Recompilation:
    """A recompile, of which torch gives one reason as a text and several as a list."""
    from torch._dynamo.utils import guard_failures

    reasons = tuple(json.loads(payload)) if payload.startswith("[") else (payload,)
    # The record does not say whose reasons these are; torch has just noted them with the code,
    # under the lock that it still holds. It notes none for a compilation that went with an object:
    # then the name comes with the end.
    for code, failures in guard_failures.items():
        if failures and failures[-1] in reasons:
            return Recompilation(
                file=code.co_filename,
                line=code.co_firstlineno,
                function=code.co_name,
                reasons=reasons,
            )
    return Recompilation(file="", line=0, function="", reasons=reasons)


def _ended(begun: Recompilation, metrics: Mapping[str, Any]) -> Recompilation:
    if name := metrics.get("co_name"):
        begun = replace(
            begun,
            file=metrics["co_filename"],
            line=metrics["co_firstlineno"],
            function=name,
        )
    limit_hit = (
        _REFUSED in (metrics.get("fail_reason") or "")
        or metrics.get("fail_type") == _REFUSED_WHOLE_GRAPH
    )
    seconds = None if limit_hit else metrics.get("entire_frame_compile_time_s")
    return replace(begun, seconds=seconds, limit_hit=limit_hit)
