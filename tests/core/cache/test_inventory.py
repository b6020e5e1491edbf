from __future__ import annotations

import os


def test_a_program_with_two_versions_of_its_sources_is_one_entry(store, warm):
    old = warm(b"one", b"three", source="a" * 32, created=10.0)
    new = warm(b"one", b"fifteen", source="b" * 32, created=20.0)
    assert old.program.key == new.program.key
    [entry] = store.entries()
    assert entry.to_json() == {
        "key": new.program.key,
        "model": "tiny-llama",
        "created": 20.0,
        "last_used": 20.0,
        "bytes": len(b"one" + b"three" + b"fifteen"),
        "units": 3,
    }


def test_entries_come_the_last_used_first(store, warm):
    keys = {
        name: warm(name.encode(), model=name, created=created).program.key
        for name, created in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    }
    assert [entry.model for entry in store.entries()] == ["c", "b", "a"]
    store.touch(keys["b"])
    os.utime(store.layout.used(keys["b"]), (100.0, 100.0))
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
