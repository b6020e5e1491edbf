from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vllmc.core.cache.key import Factor, key_of, sha256_hex
from vllmc.core.cache.record import ProgramRecord, ProgramUnit, SourceFile, UnitRecord
from vllmc.core.cache.store import Store
from vllmc.core.job import Job
from vllmc.core.models.model import ModelInfo
from vllmc.core.prediction import explain_miss, keyed, lookup, predict
from vllmc.core.spec import CompileSpec


class Named:
    """As much of a model as a prediction asks for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info = ModelInfo(dtype="float32", vocab_size=8, max_position=8, layers=1)

    made_by_code = False
    runs_in_engine = True

    def factors(self) -> tuple[Factor, ...]:
        raise AssertionError("a prediction builds no factors")

    def build(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("a prediction builds no model")


def make_job(
    hidden: int = 64,
    *,
    torch_version: str = "2.13.0",
    name: str = "toy",
    sizes: tuple[int, ...] = (),
    fuse: bool = True,
) -> Job:
    return Job(
        model=Named(name),
        spec=CompileSpec(sizes=sizes),
        factors=(
            Factor(group="versions", name="torch", value=torch_version, origin="probe"),
            Factor(group="model", name="hidden_size", value=hidden, origin="vllmc"),
            Factor(group="inductor", name="epilogue_fusion", value=fuse),
            Factor(group="spec", name="sizes", value=[*sizes]),
        ),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def put(
    store: Store, job: Job, *, sources: tuple[SourceFile, ...] = (), graph: str = ""
) -> ProgramRecord:
    """Stores a program of one unit for `job`; of another graph than any other's by default."""
    data = f"artifact of {job.key}".encode()
    artifact = store.put_artifact(data)
    factors = keyed(job, graph or sha256_hex(job.key), "1:8192")
    key = key_of(factors)
    store.put_unit(
        UnitRecord(
            key=key,
            artifact=artifact,
            format="eager-graph",
            code=sha256_hex(data),
            bytes=len(data),
            seconds=1.0,
            created=time.time(),
            factors=factors,
        )
    )
    record = ProgramRecord(
        key=job.key,
        model=job.model.name,
        created=time.time(),
        factors=job.factors,
        sources=sources,
        guarded={},
        units=(ProgramUnit(key=key, artifact=artifact, range="1:8192", pieces=("piece_0",)),),
        pieces={"total": 1, "splitting": 0, "compilable": 1, "unique": 1},
        program={},
    )
    store.put_program(record)
    return record


def damage(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-3] + b"xx\n")


def test_an_empty_cache_misses_and_has_nothing_to_compare_with(store: Store) -> None:
    predicted = predict(make_job(), store)
    assert (predicted.outcome, predicted.units) == ("miss", ())
    assert predicted.miss is not None
    assert (predicted.miss.nearest_key, predicted.miss.changes) == (None, ())


def test_a_stored_program_is_a_hit_with_its_artifacts(store: Store) -> None:
    job = make_job()
    record = put(store, job)
    predicted = predict(job, store)
    assert (predicted.outcome, predicted.miss) == ("hit", None)
    assert (predicted.program, predicted.pieces) == ("hit", record.pieces)
    assert [unit.artifact for unit in predicted.units] == [record.units[0].artifact]
    found = lookup(job, store)
    assert found is not None
    assert found.record == record


def test_another_way_to_compile_is_a_miss_that_names_the_change(store: Store) -> None:
    put(store, make_job())
    predicted = predict(make_job(torch_version="2.14.0"), store)
    assert predicted.outcome == "miss"
    assert predicted.miss is not None
    assert predicted.miss.nearest_key == make_job().key
    (change,) = predicted.miss.changes
    assert (change.name, change.before, change.after) == ("torch", "2.13.0", "2.14.0")


def test_another_model_compiled_the_same_way_is_unknown_before_capture(store: Store) -> None:
    put(store, make_job())
    predicted = predict(make_job(hidden=128), store)
    assert predicted.outcome == "unknown"
    assert predicted.miss is not None
    assert [change.name for change in predicted.miss.changes] == ["hidden_size"]
    assert predicted.miss.nearest_model is None
    elsewhere = predict(make_job(hidden=128, name="other"), store).miss
    assert elsewhere is not None
    assert elsewhere.nearest_model == "toy"


def test_a_range_that_nothing_is_stored_for_is_a_miss(store: Store) -> None:
    put(store, make_job())
    predicted = predict(make_job(sizes=(1,)), store)
    assert predicted.outcome == "miss"
    assert "for 1 token" in predicted.reason


def test_another_option_of_the_compiler_is_foreseen_unit_by_unit(store: Store) -> None:
    """The graph is the one that the stored program was captured with."""
    stored = put(store, make_job())
    graph = sha256_hex(make_job().key)
    other = make_job(hidden=128, fuse=False)
    assert predict(make_job(fuse=False), store).outcome == "miss"
    put(store, other)
    predicted = predict(make_job(fuse=False), store)
    assert predicted.outcome == "miss"
    assert [unit.artifact for unit in predicted.units] == [None]
    assert predicted.pieces == stored.pieces
    assert "1 of 1 units would be compiled" in predicted.reason

    same = put(store, other, graph=graph)
    predicted = predict(make_job(fuse=False), store)
    assert (predicted.outcome, predicted.program) == ("hit", "miss")
    assert [unit.artifact for unit in predicted.units] == [same.units[0].artifact]

    store.layout.blob(same.units[0].artifact).unlink()
    assert predict(make_job(fuse=False), store).outcome == "miss"
    store.layout.unit(stored.units[0].key).unlink()
    assert predict(make_job(fuse=False), store).outcome == "unknown"


def test_a_changed_source_file_is_a_miss_that_names_it(store: Store, tmp_path: Path) -> None:
    job = make_job()
    source = SourceFile(package="json", path="decoder.py", digest="1" * 32, functions=("decode",))
    put(store, job, sources=(source,))
    assert lookup(job, store) is None
    miss = explain_miss(job, store)
    assert miss.nearest_key == job.key
    assert any("decoder.py" in change.name for change in miss.changes)
    assert "source" in predict(job, store).reason


def test_of_two_versions_of_the_sources_the_current_one_is_found(store: Store) -> None:
    job = make_job()
    stale = SourceFile(package="json", path="decoder.py", digest="0" * 32, functions=("decode",))
    current = put(store, job)
    put(store, job, sources=(stale,))
    found = lookup(job, store)
    assert found is not None
    assert found.record == current


def test_a_lost_artifact_is_a_miss(store: Store) -> None:
    job = make_job()
    record = put(store, job)
    store.layout.blob(record.units[0].artifact).unlink()
    predicted = predict(job, store)
    assert predicted.outcome == "miss"
    assert predicted.miss is not None
    assert predicted.miss.nearest_key == job.key


def test_a_damaged_artifact_or_record_is_unsafe(store: Store) -> None:
    job = make_job()
    record = put(store, job)
    blob = store.layout.blob(record.units[0].artifact)
    intact = blob.read_bytes()
    damage(blob)
    assert predict(job, store).outcome == "unsafe"
    blob.write_bytes(intact)
    assert predict(job, store).outcome == "hit"
    damage(store.layout.program(record.key, record.id))
    predicted = predict(job, store)
    assert (predicted.outcome, predicted.units) == ("unsafe", ())


def test_a_prediction_changes_nothing(store: Store, tmp_path: Path) -> None:
    put(store, make_job())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for job in (make_job(), make_job(hidden=128), make_job(torch_version="2.14.0")):
        predict(job, store)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_program_key_ignores_where_a_value_came_from() -> None:
    job = make_job()
    moved = tuple(dataclasses.replace(f, origin="flag") for f in job.factors)
    assert Job(model=job.model, spec=job.spec, factors=moved).key == job.key
    assert make_job(hidden=65).key != job.key


class OfCode(Named):
    """A model made by the user's own code, whose Python values a capture depends on."""

    made_by_code = True

    def build(self, *args: Any, **options: Any) -> Any:
        return torch.nn.Identity()


@pytest.mark.parametrize("below", [False, True])
def test_nothing_that_an_untrusted_record_names_is_imported(
    below: bool, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    theirs = Store(tmp_path / "theirs")
    guarded: dict[str, Any] = {"M['planted'].VALUE": 1}
    # Of the same model: captured alike, and with another option of capture.
    for job in (make_job(fuse=False), make_job(hidden=128)):
        record = put(theirs, job)
        theirs.put_program(dataclasses.replace(record, guarded=guarded))
        theirs.layout.program(record.key, record.id).unlink()
    theirs.root.chmod(0o777)
    reader = Store(tmp_path / "own", (theirs.root,)) if below else theirs
    job = dataclasses.replace(make_job(), model=OfCode("toy"))
    explained = explain_miss(job, reader)
    assert explained.nearest_key is not None
    assert predict(job, reader).outcome == "unsafe"
    assert "planted" not in sys.modules
    # What asks for it is that it is trusted.
    theirs.root.chmod(0o700)
    predict(job, reader)
    assert "planted" in sys.modules
    del sys.modules["planted"]
