"""Files that are not what was written: nothing wrong is ever returned, and `verify` tells."""

from __future__ import annotations

import os
import random
import shutil

import pytest
from future import of_version_2

from vllmc.core.cache.files import CorruptArtifact, CorruptRecordError, MissingArtifact
from vllmc.core.cache.record import FormatTooNew
from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError

UNSAFE = (CorruptArtifact, CorruptRecordError, MissingArtifact, FormatTooNew)


@pytest.fixture
def store(tmp_path, publish):
    """A cache of one publication."""
    store = Store(tmp_path / "cache")
    publish().into(store)
    return store


def wrong(store, publication):
    """How many answers are given, all of which are right; an error is no answer."""
    answers = 0
    for unit in publication.units:
        for ask, right in (
            (lambda unit=unit: store.unit(unit.key), unit),
            (lambda unit=unit: store.find_code(unit.code), unit.artifact),
        ):
            try:
                answer = ask()
            except UNSAFE:
                continue
            assert answer in (None, right)
            answers += answer is not None
        try:
            data = store.read_artifact(unit.artifact)
        except UNSAFE:
            continue
        assert unit.bytes == len(data)
        answers += 1
    try:
        programs = store.programs(publication.program.key)
    except UNSAFE:
        return answers
    assert programs in ((), (publication.program,))
    return answers + len(programs)


def told(store, path):
    """Whether `verify` names this file."""
    return store.layout.relative(path) in {p.path for p in store.verify() if p.unsafe}


def files_that_count(store):
    return [f.path for f in store.layout.walk() if f.section in ("blobs", "units", "programs")]


ALL = 7  # two units, two notes of code, two artifacts, one program


def test_what_is_sound_is_found(store, publish):
    assert wrong(store, publish()) == ALL


def test_flipped_bits(store, publish, counted):
    publication = publish()
    random.seed(7)
    flips = 0
    for found in list(store.layout.walk()):
        data = found.path.read_bytes()
        for _ in range(200 if data else 0):
            place = random.randrange(len(data) * 8)
            damaged = bytearray(data)
            damaged[place // 8] ^= 1 << place % 8
            found.path.write_bytes(damaged)
            answers = wrong(store, publication)
            assert answers == ALL - 1
            flips += 1
        if data:
            assert told(store, found.path)
        found.path.write_bytes(data)
    assert wrong(store, publication) == ALL
    counted("a flipped bit at a random place of a file", flips)


def test_truncated_and_longer_files(store, publish, counted):
    publication = publish()
    random.seed(8)
    cuts = 0
    for path in files_that_count(store):
        data = path.read_bytes()
        kept = {0, 1, len(data) - 1, *random.sample(range(len(data)), 20)}
        for damaged in (*(data[:size] for size in sorted(kept)), data + b"\n", data + data):
            path.write_bytes(damaged)
            assert wrong(store, publication) == ALL - 1
            cuts += 1
            if len(damaged) < 2:
                assert told(store, path)
        path.write_bytes(data)
    counted("a file cut short, empty or longer than written", cuts)


def test_swapped_files(store, publish, counted):
    publication = publish()
    paths = files_that_count(store)
    swaps = 0
    for one in paths:
        for other in paths:
            if one == other:
                continue
            ours, theirs = one.read_bytes(), other.read_bytes()
            one.write_bytes(theirs)
            other.write_bytes(ours)
            assert wrong(store, publication) == ALL - 2
            assert told(store, one)
            assert told(store, other)
            one.write_bytes(ours)
            other.write_bytes(theirs)
            swaps += 1
    counted("two files swapped", swaps)


def replace(path, kind):
    saved = path.with_name(f"{path.name}.saved")
    path.rename(saved)
    match kind:
        case "link":
            path.symlink_to(saved)
        case "dangling link":
            path.symlink_to(path.with_name("nowhere"))
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)


@pytest.mark.parametrize("kind", ["nothing", "link", "dangling link", "directory", "pipe"])
def test_something_else_in_the_place_of_any_file_is_mended(tmp_path, publish, counted, kind):
    publication = publish()
    intact = Store(tmp_path / "intact")
    publication.into(intact)
    names = [f.path.relative_to(intact.root) for f in intact.layout.walk()]
    mended = 0
    for index, name in enumerate(names):
        store = Store(tmp_path / str(index))
        publication.into(store)
        path = store.root / name
        replace(path, kind)
        path.with_name(f"{path.name}.saved").unlink()
        if kind == "link":
            path.unlink()
            path.symlink_to(intact.root / name)
        counts = name.parts[1] != "used"
        assert wrong(store, publication) in ((ALL - 1, ALL - 2) if counts else (ALL,))
        assert store.verify() or kind == "nothing"
        store.plan_repair(store.verify()).execute()
        publication.into(store)
        assert wrong(store, publication) == ALL
        assert not any(problem.unsafe for problem in store.verify())
        assert (intact.root / name).exists(), "what a link points to is not ours"
        mended += 1
    counted(f"{kind} in the place of a file, repaired and published again", mended)


def test_a_record_of_a_future_format_is_an_error_and_stays(store, publish, counted):
    publication = publish()
    tried = 0
    for path in files_that_count(store):
        data = path.read_bytes()
        if path.suffix != ".json":
            continue
        path.write_bytes(of_version_2(data))
        with pytest.raises(FormatTooNew):
            _ = [store.load(f) for section in ("units", "programs") for f in store.walk(section)]
        assert wrong(store, publication) == ALL - 1
        assert [p.kind for p in store.verify()] == ["format-too-new"]
        assert store.plan_repair(store.verify()).removals == ()
        path.write_bytes(data)
        tried += 1
    counted("a record of a future format", tried)


@pytest.mark.parametrize("section", ["blobs", "units", "programs", "codes", "locks", "tmp"])
def test_a_file_in_the_place_of_a_directory_is_an_error(store, publish, section):
    publication = publish()
    directory = store.layout.top / section
    shutil.rmtree(directory)
    directory.write_bytes(b"")
    [problem] = [p for p in store.verify() if p.kind == "bad-cache-dir"]
    assert (problem.path, problem.unsafe) == (f"v1/{section}", True)
    assert f"v1/{section}" not in {r.path for r in store.plan_repair([problem]).removals}
    with pytest.raises(VllmcError) as caught:
        publication.into(store)
    assert caught.value.code in ("bad-cache-dir", "not-writable")
    directory.unlink()
    publication.into(store)
    assert wrong(store, publication) == ALL
