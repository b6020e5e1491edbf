from __future__ import annotations

import pytest

from vllmc.core.cache.usage import Counts


def problems(store):
    return {(problem.kind, problem.path) for problem in store.verify()}


def removed_by_repair(store, files):
    """The files that a repair removes; that it changes no other is asserted."""
    before = files(store.root)
    plan = store.plan_repair(store.verify())
    assert files(store.root) == before, "planning changes nothing"
    plan.execute()
    after = files(store.root)
    assert after == {name: data for name, data in before.items() if name in after}
    assert not any(problem.unsafe for problem in store.verify())
    return before.keys() - after.keys()


@pytest.fixture
def caches(store, warm):
    """Two programs that share one artifact: what is broken in one must not cost the other."""
    return warm(b"shared", b"one", model="a"), warm(b"shared", b"two", model="b")


@pytest.fixture
def where(store):
    """The paths of things as problems name them."""

    class Where:
        def blob(self, unit):
            return store.layout.relative(store.layout.blob(unit.artifact))

        def unit(self, unit):
            return store.layout.relative(store.layout.unit(unit.key))

        def program(self, program):
            return store.layout.relative(store.layout.program(program.key, program.id))

    return Where()


def test_a_sound_cache_has_no_problem_and_nothing_to_repair(store, caches, files):
    store.note_use(caches[0].program.key, Counts())
    with store.lock("x", pytest.fail):
        (store.layout.temporary / "1.draft").write_bytes(b"half a fi")
        assert store.verify() == ()
    assert removed_by_repair(store, files) == set()


@pytest.mark.parametrize("data", [b"", b"on", b"onf", b"one more"])
def test_a_corrupt_artifact_goes_with_the_records_that_name_it(store, caches, files, where, data):
    [_, one] = caches[0].units
    store.layout.blob(one.artifact).write_bytes(data)
    assert problems(store) == {("corrupt-artifact", where.blob(one))}
    assert removed_by_repair(store, files) == {
        where.blob(one),
        where.unit(one),
        where.program(caches[0].program),
    }
    assert store.programs(caches[1].program.key) == (caches[1].program,)


def test_a_shared_corrupt_artifact_takes_both_programs_and_no_other_unit(
    store, caches, files, where
):
    [shared, one] = caches[0].units
    store.layout.blob(shared.artifact).write_bytes(b"shared?")
    assert removed_by_repair(store, files) == {
        where.blob(shared),
        where.unit(shared),
        where.program(caches[0].program),
        where.program(caches[1].program),
    }
    assert store.unit(one.key) == one


def test_a_missing_artifact_is_told_by_the_records_that_name_it(store, caches, files, where):
    [_, one] = caches[0].units
    store.layout.blob(one.artifact).unlink()
    expected = {where.unit(one), where.program(caches[0].program)}
    assert problems(store) == {("missing-artifact", path) for path in expected}
    assert all(one.artifact in problem.detail for problem in store.verify())
    assert removed_by_repair(store, files) == expected


def test_a_corrupt_record_goes_alone(store, caches, files, where):
    [_, one] = caches[0].units
    path = store.layout.unit(one.key)
    path.write_bytes(path.read_bytes()[:-1])
    assert problems(store) == {("corrupt-record", where.unit(one))}
    assert removed_by_repair(store, files) == {where.unit(one)}
    assert store.programs(caches[0].program.key) == (caches[0].program,)


def test_a_link_or_a_directory_in_the_place_of_a_file_is_corrupt(store, caches, tmp_path, where):
    (_, one), (_, two) = caches[0].units, caches[1].units
    blob = store.layout.blob(one.artifact)
    blob.rename(tmp_path / "moved")
    blob.symlink_to(tmp_path / "moved")
    record = store.layout.unit(two.key)
    record.unlink()
    record.mkdir()
    (record / "inside").write_bytes(b"")
    assert problems(store) == {
        ("corrupt-artifact", where.blob(one)),
        ("corrupt-record", where.unit(two)),
    }
    store.plan_repair(store.verify()).execute()
    assert store.verify() == ()
    assert (tmp_path / "moved").read_bytes() == b"one", "what a link points to is not ours"


def test_repair_removes_a_link_to_a_directory_and_not_the_directory(store, caches, tmp_path):
    [_, one] = caches[0].units
    (tmp_path / "mine").mkdir()
    blob = store.layout.blob(one.artifact)
    blob.unlink()
    blob.symlink_to(tmp_path / "mine")
    store.plan_repair(store.verify()).execute()
    assert store.verify() == ()
    assert (tmp_path / "mine").is_dir()


def test_a_foreign_file_is_named_and_left_alone(store, caches, files):
    (store.layout.top / "blobs" / "notes.txt").write_bytes(b"mine")
    [problem] = store.verify()
    assert problem.to_json() == {
        "path": "v1/blobs/notes.txt",
        "kind": "foreign-file",
        "detail": "vllmc did not write this file",
    }
    assert not problem.unsafe
    assert removed_by_repair(store, files) == set()


def test_a_repair_removes_records_before_the_artifacts_they_name(store, caches, where):
    [_, one] = caches[0].units
    store.layout.blob(one.artifact).write_bytes(b"")
    plan = store.plan_repair(store.verify())
    assert [removal.path for removal in plan.removals][-1] == where.blob(one)
    assert where.blob(one) in plan.removals[0].reason


def test_a_repair_of_what_is_gone_already_is_no_error(store, caches):
    store.layout.blob(caches[0].units[1].artifact).write_bytes(b"")
    plan = store.plan_repair(store.verify())
    plan.execute()
    plan.execute()
    assert store.verify() == ()


def test_a_link_in_the_place_of_a_directory_is_told_and_left_alone(store, caches):
    blobs = store.layout.top / "blobs"
    elsewhere = blobs.rename(store.root.parent / "elsewhere")
    blobs.symlink_to(elsewhere)
    for directory in (store.layout.top / "units" / "zz", store.layout.top / "codes" / "0"):
        directory.write_text("")
    problems = store.verify()
    assert [(p.kind, p.path) for p in problems if p.unsafe] == [("bad-cache-dir", "v1/blobs")]
    assert store.plan_repair(problems).removals == ()


@pytest.mark.parametrize("name", ["used/" + "ab" * 32, "locks/x.lock", "facts/x", "tmp/x"])
def test_a_directory_in_the_place_of_any_file_is_told_and_removed(store, caches, name):
    path = store.layout.top / name
    path.mkdir(parents=True)
    [problem] = store.verify()
    assert (problem.kind, problem.path) == ("corrupt-record", f"v1/{name}")
    store.plan_repair([problem]).execute()
    assert store.verify() == ()


@pytest.mark.parametrize("what", ["blob", "unit", "program"])
def test_what_was_mended_since_is_not_removed(store, caches, where, what, files):
    one = caches[0].units[1]
    path = store.root / getattr(where, what)(caches[0].program if what == "program" else one)
    data = path.read_bytes()
    path.write_bytes(b"damaged")
    found = store.verify()
    assert found
    path.write_bytes(data)
    before = files(store.root)
    store.plan_repair(found).execute()
    assert files(store.root) == before
