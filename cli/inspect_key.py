"""`vllmc inspect-key`: every factor of a cache key, and what the cache would answer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vllmc.cli import job as jobs
from vllmc.cli import report
from vllmc.cli.options import CommonFlags, CompileFlags, command, compile_request
from vllmc.cli.output import Output
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
            metavar="MODEL|KEY|DIR",
            show_default="tiny-llama",
            help="A model, a stored key (8 or more hex digits of it), a vLLM cache directory or a "
            "TORCH_TRACE directory.",
        ),
    ] = None,
) -> None:
    """Show the factors of a model's cache key and predict whether the cache would hit.

    For a stored KEY it shows the factors that were recorded, with no prediction. It exits 0
    whatever it predicts: warm --check is the check. -v shows also the factors that nobody set, and
    what is no factor.

    DIR is a directory of vLLM's torch_compile_cache, at any level: it shows what the cache is
    keyed by, which of it shapes no code, which artifacts repeat and which paths break a move. Of
    several keys it says how each differs from the one before. Nothing is unpickled. Where vLLM ran
    with vllmc's plugin (docs/vllm.md) the fields of its config, sources and compiler are shown too.

    Of a TORCH_TRACE directory, or one log of it, it says for each compilation what torch's caches
    answered, and why one was bypassed. -v shows also the keys and their components.

    With --json: model, key, prediction (outcome: hit, miss, unsafe or unknown; reason,
    nearest_key, nearest_model where it is another, changes as diff-config lists them), factors
    (group, name, value, digest, origin: default, env:NAME, file:NAME:LINE, flag, vllmc or probe;
    is_default, affects_key) and excluded (name, reason). Written to a file it is a snapshot for
    diff-config.

    For DIR the key is vLLM's, there is no prediction, and caches lists each cache: kind (compile
    or aot), key, path, release, bytes, modified, compilations (label, pieces, ranges, artifacts:
    name, range, piece, bytes, digest), artifacts, unique_artifacts, duplicate_bytes, stores,
    spurious (name, value, reason, advice), secrets, paths (path, role: handle, moved, factor,
    source or artifact; where, meaning), differs (names of factors) and notes. Factors, spurious,
    secrets and paths are those of the first rank. Of several caches artifacts are not read, and
    key and factors are empty.

    For a trace there is no prediction, key is empty, and factors are the components that all keys
    of the trace share, with torch's hash as digest. torch is the version that wrote it, and
    compilations lists each: id, rank, frame, label (these three, to be read), outcome (hit,
    partial, miss, bypass, disabled, or none where no cache was asked) and lookups (cache:
    aot_autograd or fx_graph; answer: hit, miss, bypass, disabled or unsaved; key, reason, backward,
    and components that are not among factors: name, value, digest). notes say what was not
    understood. It is no snapshot: compare the traces.
    """
    settings = common.settings()
    output = common.output("inspect-key")
    if target and Path(target).exists() and _foreign(Path(target), output):
        return
    store = settings.store()
    key = stored_key(store, target) if target and not Path(target).exists() else None
    row = _stored(store, key) if key else _current(settings, compilation, store, target)
    output.data(row, lambda: report.inspect(row, whole=output.verbosity > 0))


def _foreign(path: Path, output: Output) -> bool:
    """Prints what another system left there; False where it is nothing that is inspected."""
    from vllmc.cli.foreign import kind_of

    whole = output.verbosity > 0
    match kind_of(path):
        case "vllm-cache":
            from vllmc.cli.vllm_inspect import vllm_report, vllm_row

            row = vllm_row(path)
            output.data(row, lambda: vllm_report(row, whole=whole))
        case "torch-trace":
            from vllmc.cli.torch_inspect import torch_report, torch_row

            row = torch_row(path)
            output.data(row, lambda: torch_report(row, whole=whole))
        case _:
            return False
    return True


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
