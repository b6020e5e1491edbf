"""A fault at every step of a publication: a reader sees nothing of it, or something whole."""

from __future__ import annotations

import shutil

import pytest

from vllmc.core.cache.store import Store

CODES = {
    "kill": {"killed"},
    "ENOSPC": {"disk-full", "done"},
    "EIO": {"cache-io-error", "done"},
    "EACCES": {"not-writable", "done"},
}


def whole(files, store):
    """The files that a publication leaves, whatever was left on the way."""
    return {k: v for k, v in files(store.root).items() if "/tmp/" not in k}


def read(store, publication):
    """The records that are there, each of them with its artifacts."""
    programs = store.programs(publication.program.key)
    units = [store.unit(unit.key) for unit in publication.units]
    for record in (*programs, *units):
        if record is not None:
            for artifact in getattr(record, "units", (record,)):
                store.read_artifact(artifact.artifact)
    return programs, units


@pytest.mark.parametrize("fault", CODES)
def test_a_fault_at_any_step_of_a_first_publication(publish, tmp_path, files, counted, fault):
    publication = publish()
    expected = Store(tmp_path / "expected")
    publication.into(expected)
    words = publication.meets(fault, tmp_path / "caches")
    assert set(words) <= CODES[fault]
    for moment in range(len(words)):
        store = Store(tmp_path / "caches" / str(moment))
        assert store.verify() == ()
        programs, units = read(store, publication)
        assert programs in ((), (publication.program,))
        assert all(
            unit in (None, known) for unit, known in zip(units, publication.units, strict=True)
        )
        if fault != "kill":
            assert not any("/tmp/" in name for name in files(store.root))
        publication.into(store)
        assert whole(files, store) == whole(files, expected)
    counted(f"{fault} at each step of a first publication", len(words))


@pytest.mark.parametrize("fault", ["kill", "ENOSPC"])
def test_a_fault_at_any_step_of_replacing_what_is_there(publish, tmp_path, files, counted, fault):
    old, new = publish(seconds=1.5), publish(seconds=2.5)
    before, after = Store(tmp_path / "before"), Store(tmp_path / "after")
    old.into(before)
    new.into(after)
    caches = tmp_path / "caches"
    for moment in range(150):
        shutil.copytree(before.root, caches / str(moment))
    words = new.meets(fault, caches)
    assert len(words) < 150
    assert set(words) <= CODES[fault]
    for moment in range(len(words)):
        store = Store(caches / str(moment))
        assert store.verify() == ()
        [program], units = read(store, new)
        assert program in (old.program, new.program)
        for unit, *known in zip(units, old.units, new.units, strict=True):
            assert unit in known
        new.into(store)
        assert whole(files, store) == whole(files, after)
    counted(f"{fault} at each step of a publication over another", len(words))
