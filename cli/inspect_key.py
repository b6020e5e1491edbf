"""`vllmc inspect-key`: every factor of a cache key, and what the cache would answer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vllmc.cli import job as jobs
from vllmc.cli import report
from vllmc.cli.options import CommonFlags, CompileFlags, command, compile_request
from vllmc.cli.settings import Settings
from vllmc.cli.snapshots import stored_key
from vllmc.core.cache.key import Factor
from vllmc.core.cache.record import UnitRecord
from vllmc.core.cache.store import Store

Row = dict[str, Any]


@command
def inspect_key(
    compilation: CompileFlags,
    common: CommonFlags,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|KEY",
            show_default="tiny-llama",
            help="A model, or a stored key (8 or more hex digits of it).",
        ),
    ] = None,
) -> None:
    """Show the factors of a model's cache key and predict whether the cache would hit.

    For a stored KEY it shows the factors that were recorded, with no prediction. It exits 0
    whatever it predicts: warm --check is the check. -v shows also the factors that nobody set, and
    what is no factor.

    With --json: model, key, prediction (outcome: hit, miss, unsafe or unknown; reason,
    nearest_key, nearest_model where it is another, changes as diff-config lists them), factors
    (group, name, value, digest, origin: default, env:NAME, file:NAME:LINE, flag, vllmc or probe;
    is_default, affects_key) and excluded (name, reason). Written to a file it is a snapshot for
    diff-config.
    """
    settings = common.settings()
    output = common.output("inspect-key")
    store = Store(settings.cache_dir)
    key = stored_key(store, target) if target and not Path(target).exists() else None
    row = _stored(store, key) if key else _current(settings, compilation, store, target)
    output.data(row, lambda: report.inspect(row, whole=output.verbosity > 0))


def _stored(store: Store, key: str) -> Row:
    record = store.record(key)
    if isinstance(record, UnitRecord):
        return {"model": "", **_key_row(key, record.factors), "excluded": []}
    return {"model": record[0].model, **_key_row(key, record[0].factors), "excluded": []}


def _current(settings: Settings, compilation: CompileFlags, store: Store, model: str | None) -> Row:
    job = jobs.make(settings, compile_request(settings, compilation, model))
    from vllmc.core.cache.factors import excluded
    from vllmc.core.prediction import Miss, predict

    prediction = predict(job, store)
    miss = prediction.miss or Miss(nearest_key=None, changes=())
    return {
        "model": job.model.name,
        "prediction": {
            "outcome": prediction.outcome,
            "reason": prediction.reason,
            **miss.to_json(),
        },
        **_key_row(job.key, job.factors),
        "excluded": [{"name": name, "reason": reason} for name, reason in excluded()],
    }


def _key_row(key: str, factors: Iterable[Factor]) -> Row:
    return {"key": key, "factors": [factor.to_json() for factor in factors]}
