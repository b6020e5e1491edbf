"""What `warm --json` says of one model: a row, as docs/schema/warm.schema.json describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllmc.cli.output import error_fields
from vllmc.core.cache.redaction import scrub
from vllmc.core.cache.store import Store
from vllmc.core.errors import CheckFailed, UnsafeCacheError, VllmcError

if TYPE_CHECKING:
    from vllmc.core.job import Job
    from vllmc.core.pipeline import Ready

Row = dict[str, Any]

PREDICTED_CODES = {
    "would-miss": CheckFailed.exit_code,
    "unknown": CheckFailed.exit_code,
    "unsafe": UnsafeCacheError.exit_code,
}
_PREDICTED = {"hit": "would-hit", "miss": "would-miss"}
_NO_SECONDS = dict.fromkeys(("total", "capture", "compile", "store"), 0.0)
_NO_COUNTS = dict.fromkeys(("hit", "dup", "compiled"), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What each row begins with: the entry's or the model's name, and how often it was tried."""

    name: str
    attempts: int


def ready_row(head: Head, job: Job, ready: Ready, store: Store) -> Row:
    """The row of a model that was warmed."""
    units = [
        {
            "pieces": list(unit.pieces),
            "range": unit.range,
            "outcome": unit.outcome,
            "artifact": unit.artifact,
            "bytes": len(unit.data),
            "seconds": round(unit.seconds, 4),
        }
        for unit in ready.units
    ]
    found = [unit.key for unit in ready.units if unit.outcome == "hit"]
    return empty_row(head, job.model.name, job.key, ready.outcome) | {
        "program": ready.program,
        "pieces": ready.record.pieces,
        "counts": {name: ready.count(name) for name in ("hit", "dup", "compiled")},
        "units": units,
        "seconds": {
            "total": round(ready.seconds.total, 4),
            "capture": round(ready.seconds.capture, 4),
            "compile": round(ready.seconds.compile, 4),
            "store": round(ready.seconds.store, 4),
        },
        "saved_seconds": round(store.compile_seconds(found), 4),
        "miss": ready.miss and ready.miss.to_json(),
        "layer_names": ready.layer_names and ready.layer_names.to_json(),
        "passes": [report.to_json() for report in ready.passes],
    }


def predicted_row(head: Head, job: Job, store: Store) -> Row:
    """The row of `warm --check`: what a warm would find in `store`."""
    from vllmc.core.prediction import predict

    prediction = predict(job, store)
    units = prediction.units
    stored = sum(unit.artifact is not None for unit in units)
    outcome = _PREDICTED.get(prediction.outcome, prediction.outcome)
    return empty_row(head, job.model.name, job.key, outcome) | {
        "program": prediction.program,
        "pieces": prediction.pieces,
        "counts": {"hit": stored, "dup": 0, "compiled": len(units) - stored},
        "units": [
            {
                "pieces": list(unit.pieces),
                "range": unit.range,
                "outcome": "compiled" if unit.artifact is None else "hit",
                "artifact": unit.artifact,
                "bytes": unit.bytes,
                "seconds": 0.0,
            }
            for unit in units
        ],
        "reason": prediction.reason,
        "miss": prediction.miss and prediction.miss.to_json(),
    }


def failed_row(head: Head, model: str, key: str | None, error: VllmcError) -> Row:
    """The row of a model that `error` kept from being warmed; no key where it was not found."""
    return empty_row(head, model, key, "failed") | {
        "reason": scrub(error.message),
        "error": error_fields(error),
    }


def empty_row(head: Head, model: str, key: str | None, outcome: str) -> Row:
    """A row with all the fields that each has; those of a model of which no more is known."""
    return {
        "name": head.name,
        "model": model,
        "key": key,
        "outcome": outcome,
        "program": "miss",
        "pieces": None,
        "counts": _NO_COUNTS,
        "units": [],
        "seconds": _NO_SECONDS,
        "saved_seconds": 0.0,
        "attempts": head.attempts,
        "peak_rss_mb": _peak_rss_mb(),
        "miss": None,
        "layer_names": None,
        "passes": [],
    }


def _peak_rss_mb() -> int:
    # `getrusage` would count what the process held that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) // 1024
