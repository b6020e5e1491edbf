"""Layers: a cache over others that are only read, as one that was baked into an image is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from vllmc.core.cache.prune import execute, plan_prune
from vllmc.core.cache.retention import Criteria
from vllmc.core.cache.store import CorruptArtifact, CorruptRecordError, Store
from vllmc.core.cache.usage import Counts


@pytest.fixture
def layered(store: Store, tmp_path: Path) -> Store:
    """An empty first layer over the directory of `store`."""
    return Store(tmp_path / "first", (store.root,))


def test_what_lies_below_is_found_and_nothing_is_written_there(layered, store, warm, files):
    warmed = warm(b"one", b"two")
    before = files(store.root)
    assert layered.programs(warmed.program.key) == (warmed.program,)
    assert [layered.unit(unit.key) for unit in warmed.units] == list(warmed.units)
    assert layered.read_artifact(warmed.units[0].artifact) == b"one"
    assert layered.find_code(warmed.units[0].code) == warmed.units[0].artifact
    assert [(e.key, e.bytes) for e in layered.entries()] == [(warmed.program.key, 6)]
    assert layered.resolve_prefix(warmed.program.key[:8]) == warmed.program.key
    assert layered.stats() == store.stats()
    layered.note_use(warmed.program.key, Counts(hits=1))
    assert layered.entries()[0].last_used > 1e9
    assert files(store.root) == before


def test_new_records_go_to_the_first_layer_and_known_artifacts_are_not_copied(
    layered, store, warm, make_unit, make_program, files
):
    warm(b"one")
    before = files(store.root)
    unit = dataclasses.replace(make_unit(b"one"), key="e" * 64)
    layered.put_artifact(b"one")
    layered.put_unit(unit)
    program = make_program((unit,), model="other")
    layered.put_program(program)
    assert files(store.root) == before
    assert not layered.layout.blob(unit.artifact).exists()
    assert layered.programs(program.key) == (program,)
    assert layered.read_artifact(unit.artifact) == b"one"
    assert len(layered.entries()) == 2
    assert layered.verify() == ()


def test_what_is_in_two_layers_is_there_once(layered, warm, store):
    warmed = warm(b"one")
    for layer in (layered, store):
        layer.put_unit(warmed.units[0])
        layer.put_program(warmed.program)
    assert layered.programs(warmed.program.key) == (warmed.program,)
    assert len(list(layered.readable_units())) == 1
    assert len(layered.entries()) == 1
    assert layered.stats().units == 1


def test_the_first_layer_counts(layered, store, make_unit, warm):
    warmed = warm(b"one")
    newer = dataclasses.replace(warmed.units[0], created=2000.0)
    layered.put_unit(newer)
    assert layered.unit(newer.key) == newer


def test_what_is_corrupt_below_is_left_there_and_taken_for_absent(layered, store, warm):
    warmed = warm(b"one")
    record = store.layout.unit(warmed.units[0].key)
    record.write_bytes(b"damaged")
    with pytest.raises(CorruptRecordError) as caught:
        layered.unit(warmed.units[0].key)
    layered.discard(caught.value)
    assert layered.unit(warmed.units[0].key) is None
    assert record.read_bytes() == b"damaged"
    layered.put_unit(warmed.units[0])
    assert layered.unit(warmed.units[0].key) == warmed.units[0]


def test_a_corrupt_artifact_below_is_replaced_in_the_first_layer(layered, store, warm):
    warmed = warm(b"one")
    blob = store.layout.blob(warmed.units[0].artifact)
    blob.write_bytes(b"two")
    with pytest.raises(CorruptArtifact) as caught:
        layered.read_artifact(warmed.units[0].artifact)
    layered.discard(caught.value)
    layered.put_artifact(b"one")
    assert layered.read_artifact(warmed.units[0].artifact) == b"one"


def test_a_corrupt_artifact_of_the_first_layer_is_read_from_the_one_below(layered, store, warm):
    warmed = warm(b"one")
    digest = warmed.units[0].artifact
    alone = Store(layered.root)
    alone.put_artifact(b"one")
    alone.layout.blob(digest).write_bytes(b"two")
    assert layered.read_artifact(digest) == b"one"


def test_verify_names_problems_of_every_layer_and_repairs_the_first(layered, store, warm):
    warmed = warm(b"one")
    layered.put_unit(warmed.units[0])
    below = store.layout.blob(warmed.units[0].artifact)
    below.write_bytes(b"two")
    layered.layout.unit(warmed.units[0].key).write_bytes(b"damaged")
    problems = layered.verify()
    assert {(p.kind, p.path) for p in problems} == {
        ("corrupt-artifact", str(below)),
        ("corrupt-record", layered.layout.relative(layered.layout.unit(warmed.units[0].key))),
    }
    layered.plan_repair(problems).execute()
    assert [p.path for p in layered.verify()] == [str(below)]
    assert below.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_a_layer_of_another_user_is_refused_though_the_first_is_ones_own(layered, store, warm):
    warmed = warm(b"one")
    os.chown(store.root, 4321, -1)
    with pytest.raises(Exception, match="it belongs to user 4321"):
        layered.programs(warmed.program.key)


def test_prune_leaves_the_layers_below_and_what_their_programs_use(layered, store, warm, files):
    below = warm(b"one")
    layered.note_use(below.program.key, Counts(hits=1)).release()
    blob = layered.layout.blob(below.units[0].artifact)
    blob.parent.mkdir(parents=True)
    # As one that stands in for what is corrupt below.
    blob.write_bytes(b"one")
    own = dataclasses.replace(below.program, model="own", key="d" * 64)
    layered.put_program(own)
    for path in layered.layout.top.rglob("*"):
        os.utime(path, (1000.0, 1000.0))
    before = files(store.root)
    done = execute(plan_prune(layered, Criteria(max_count=0)))
    assert [(item.kind, item.model) for item in done.removed] == [("program", "own")]
    assert files(store.root) == before
    assert layered.layout.used(below.program.key).exists()
    assert layered.stats().hits == 1


def test_a_found_artifact_of_a_layer_below_is_not_copied(layered, warm):
    [unit] = warm(b"one").units
    layered.retain(unit.artifact, b"one")
    assert not layered.layout.blob(unit.artifact).exists()
    assert layered.compile_seconds([unit.key]) == unit.seconds
