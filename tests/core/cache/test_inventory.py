from __future__ import annotations

import os

from vllmc.core.cache.usage import Counts


def came_in(store, program, when):
    os.utime(store.layout.program(program.key, program.id), (when, when))


def test_a_program_with_two_versions_of_its_sources_is_one_entry(store, warm):
    old = warm(b"one", b"three", source="a" * 32, created=10.0)
    new = warm(b"one", b"fifteen", source="b" * 32, created=20.0)
    assert old.program.key == new.program.key
    came_in(store, old.program, 40.0)
    came_in(store, new.program, 30.0)
    [entry] = store.entries()
    assert entry.to_json() == {
        "key": new.program.key,
        "model": "tiny-llama",
        "created": 20.0,
        "last_used": 40.0,
        "bytes": len(b"one" + b"three" + b"fifteen"),
        "units": 3,
    }


def test_entries_come_the_last_used_first(store, warm):
    programs = {name: warm(name.encode(), model=name).program for name in "abc"}
    for when, program in enumerate(programs.values()):
        came_in(store, program, when)
    assert [entry.model for entry in store.entries()] == ["c", "b", "a"]
    key = programs["b"].key
    store.note_use(key, Counts())
    os.utime(store.layout.used(key), (100.0, 100.0))
    assert [entry.model for entry in store.entries()] == ["b", "c", "a"]


def test_an_entry_counts_only_the_artifacts_that_are_there(store, warm):
    warmed = warm(b"one", b"three")
    store.layout.blob(warmed.units[1].artifact).unlink()
    [entry] = store.entries()
    assert (entry.bytes, entry.units) == (3, 2)


def test_shared_artifacts_count_once_in_all_and_once_for_each_model(store, warm):
    warm(b"one", b"three", model="small")
    warm(b"one", b"three", b"fifteen", model="large")
    stats = store.stats()
    assert (stats.programs, stats.units, stats.artifacts) == (2, 3, 3)
    assert (stats.bytes, stats.unreferenced_bytes) == (15, 0)
    rows = [(row.model, row.programs, row.bytes) for row in stats.by_model]
    assert rows == [("large", 1, 15), ("small", 1, 8)]


def test_artifacts_that_no_record_names_are_unreferenced(store, warm):
    warmed = warm(b"one")
    [unit] = warmed.units
    store.put_artifact(b"left over")
    assert store.stats().unreferenced_bytes == len(b"left over")
    store.layout.unit(unit.key).unlink()
    assert store.stats().unreferenced_bytes == len(b"left over"), "the program still names it"
    store.layout.program(warmed.program.key, warmed.program.id).unlink()
    assert store.stats().unreferenced_bytes == len(b"left over" + b"one")
    store.put_unit(unit)
    assert store.stats().unreferenced_bytes == len(b"left over")


def test_uses_are_summed_over_all_programs_and_by_model(store, warm):
    small, large = warm(b"one", model="small").program, warm(b"two", model="large").program
    store.note_use(small.key, Counts(misses=3, dups=1))
    store.note_use(small.key, Counts(hits=3, seconds_saved=1.1))
    store.note_use(large.key, Counts(hits=2, misses=1, seconds_saved=2.2))
    store.note_use("0" * 64, Counts(hits=1000))
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.dups, stats.seconds_saved) == (5, 4, 1, 3.3)
    rows = [(r.model, r.hits, r.misses, r.dups, r.seconds_saved) for r in stats.by_model]
    assert rows == [("large", 2, 1, 0, 2.2), ("small", 3, 3, 1, 1.1)]


def test_inodes_are_files_and_directories(store, warm):
    assert store.stats().inodes == 0
    warm(b"one")
    assert store.stats().inodes == 1 + len(list(store.root.rglob("*")))
