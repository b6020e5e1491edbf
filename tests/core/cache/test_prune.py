from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.cache import facts
from vllmc.core.cache.exchange import Vouched, note_import
from vllmc.core.cache.key import Factor, sha256_hex
from vllmc.core.cache.prune import execute, plan_prune
from vllmc.core.cache.record import decode, encode
from vllmc.core.cache.retention import Criteria
from vllmc.core.cache.store import Store
from vllmc.core.cache.usage import Counts
from vllmc.core.errors import VllmcError

ALL = Criteria(max_count=0)
GARBAGE = Criteria()
LONG_AGO = time.time() - 100 * 86400


def settle(store, when=LONG_AGO):
    """As if everything had been written long ago."""
    for path in store.layout.top.rglob("*"):
        os.utime(path, (when, when))


def used_at(store, program, when):
    store.note_use(program.key, Counts(hits=1))
    os.utime(store.layout.used(program.key), (when, when))


def prune(store, criteria):
    return execute(plan_prune(store, criteria))


def models(store):
    return sorted(entry.model for entry in store.entries())


def kinds(items):
    return [(item.kind, item.key) for item in items]


def left(store):
    """The sections of the files that are left."""
    return sorted(found.section for found in store.layout.walk())


@pytest.fixture
def three(store, warm):
    """Three programs, `old` used first and `new` last, that share one artifact."""
    programs = {name: warm(name.encode(), b"shared", model=name) for name in ("old", "mid", "new")}
    settle(store)
    for days, name in enumerate(("new", "mid", "old"), start=1):
        used_at(store, programs[name].program, time.time() - days * 86400)
    return programs


def test_an_absent_cache_has_nothing_to_prune_and_is_not_made(tmp_path):
    plan = plan_prune(Store(tmp_path / "none"), ALL)
    assert (plan.removals, plan.kept, plan.bytes_before, plan.bytes_after) == ((), (), 0, 0)
    assert execute(plan).removed == ()
    assert list(tmp_path.iterdir()) == []


def test_a_plan_changes_nothing(store, three, files):
    before = files(store.root)
    assert plan_prune(store, ALL).removals
    assert files(store.root) == before


def test_the_least_recently_used_go_until_few_enough_are_left(store, three):
    done = prune(store, Criteria(max_count=1))
    assert models(store) == ["new"]
    assert {item.model for item in done.removed} == {"old", "mid"}
    assert store.verify() == ()
    assert prune(store, Criteria(max_count=1)).removed == ()


def test_what_a_program_that_stays_needs_is_kept(store, three):
    prune(store, Criteria(max_count=2))
    kept = [unit for name in ("mid", "new") for unit in three[name].units]
    for unit in kept:
        assert store.read_artifact(unit.artifact)
        assert store.unit(unit.key) == unit
        assert store.find_code(unit.code) == unit.artifact
    gone = three["old"].units[0]
    assert store.unit(gone.key) is store.find_code(gone.code) is None
    assert not store.layout.blob(gone.artifact).exists()


def test_programs_go_by_the_age_of_their_last_use(store, three):
    plan = plan_prune(store, Criteria(older_than=2.5 * 86400))
    assert {item.reason for item in plan.removals if item.kind == "program"} == {
        "last used 3 days ago"
    }
    execute(plan)
    assert models(store) == ["mid", "new"]


def test_a_program_of_which_no_use_is_noted_was_used_when_it_was_stored(store, warm):
    program = warm(b"one", model="imported", created=1.0).program
    assert prune(store, Criteria(older_than=3600)).removed == ()
    record = store.layout.program(program.key, program.id)
    os.utime(record, (LONG_AGO, LONG_AGO))
    assert prune(store, Criteria(older_than=3600)).removed
    assert models(store) == []


def test_programs_go_until_all_files_fit(store, three, files):
    total = sum(map(len, files(store.root).values()))
    plan = plan_prune(store, Criteria(max_bytes=total - 1))
    assert plan.bytes_before == total
    assert {item.model for item in plan.removals} == {"old"}
    execute(plan)
    assert plan.bytes_after == sum(map(len, files(store.root).values())) < total
    assert prune(store, Criteria(max_bytes=plan.bytes_after)).removed == ()
    assert prune(store, Criteria(max_bytes=plan.bytes_after - 1)).removed
    assert models(store) == ["new"]


def test_programs_of_another_torch_go_only_when_asked(store, warm):
    for version in ("2.12.0", "2.13.0"):
        factors = (Factor(group="versions", name="torch", value=version, origin="probe"),)
        warm(version.encode(), model=f"on {version}", factors=factors)
    warm(b"neither", model="says nothing")
    assert prune(store, GARBAGE).removed == ()
    plan = plan_prune(store, Criteria(other_torch="2.13.0"))
    assert {i.reason for i in plan.removals if i.kind == "program"} == {"it takes torch 2.12.0"}
    execute(plan)
    assert models(store) == ["on 2.13.0", "says nothing"]


def test_all_versions_of_a_program_go_and_its_directory_too(store, warm):
    for source in ("a" * 32, "b" * 32):
        key = warm(source.encode(), source=source).program.key
    store.note_use(key, Counts(hits=1))
    removed = prune(store, ALL).removed
    assert [item.kind for item in removed if item.key == key] == ["program", "program", "use"]
    assert left(store) == []
    assert not store.layout.programs(key).exists()
    warm(b"again")
    assert len(store.entries()) == 1


def test_removals_leave_no_record_that_names_what_is_gone(store, three):
    removed = [item.kind for item in prune(store, ALL).removed]
    order = ("program", "use", "unit", "code", "artifact")
    ranks = [max(1, order.index(kind)) for kind in removed]
    assert ranks == sorted(ranks)


def test_only_what_nothing_refers_to_goes_without_a_criterion(store, three):
    digest = store.put_artifact(b"of no unit")
    (store.layout.temporary / "1.ab").write_bytes(b"half a fi")
    settle(store)
    assert kinds(prune(store, GARBAGE).removed) == [("artifact", digest), ("temporary", "1.ab")]
    assert len(store.entries()) == 3


def test_the_use_of_a_program_that_is_gone_goes_too(store, warm):
    program = warm(b"one").program
    store.note_use(program.key, Counts(hits=1))
    store.layout.program(program.key, program.id).unlink()
    settle(store)
    removed = {item.kind for item in prune(store, GARBAGE).removed}
    assert removed == {"use", "unit", "code", "artifact"}
    assert left(store) == []


def test_what_is_young_may_be_of_a_model_that_is_being_compiled(store, make_unit):
    unit = make_unit(b"one")
    store.put_artifact(b"one")
    store.put_unit(unit)
    (store.layout.temporary / "1.ab").write_bytes(b"half a fi")
    done = prune(store, ALL)
    assert done.removed == ()
    assert {item.kind for item in done.kept} == {"unit", "code", "artifact", "temporary"}
    assert {item.reason for item in done.kept} == {
        "it may be of a model that is being compiled now"
    }
    settle(store)
    assert len(prune(store, ALL).removed) == 4


def test_youth_is_told_by_the_file_system_s_clock(store, monkeypatch):
    store.put_artifact(b"young")
    old = store.layout.blob(store.put_artifact(b"old"))
    os.utime(old, (LONG_AGO, LONG_AGO))
    for wrong in (0.0, 4e9):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda wrong=wrong: wrong)
            plan = plan_prune(store, GARBAGE)
        assert [item.key for item in plan.removals] == [sha256_hex(b"old")]


def test_what_a_fresh_program_alone_needs_goes_with_it(store, warm):
    warm(b"one", b"two")
    assert prune(store, ALL).kept == ()
    assert left(store) == []


def test_what_a_compilation_found_since_its_program_was_stored_stays(store, warm):
    unit = warm(b"found", b"not found").units[0]
    settle(store)
    store.retain(unit.artifact, b"found")
    done = prune(store, ALL)
    assert kinds(done.kept) == [("code", unit.code), ("artifact", unit.artifact)]
    assert store.read_artifact(unit.artifact) == b"found"


def test_a_found_artifact_that_a_prune_removed_is_written_again(store):
    digest = store.put_artifact(b"one")
    settle(store)
    prune(store, GARBAGE)
    store.retain(digest, b"one")
    assert store.read_artifact(digest) == b"one"


@pytest.mark.parametrize("again", ["artifact", "unit"])
def test_what_is_put_again_counts_as_young(store, make_unit, again):
    unit = make_unit(b"one")
    store.put_artifact(b"one")
    store.put_unit(unit)
    settle(store)
    if again == "artifact":
        store.put_artifact(b"one")
    else:
        store.put_unit(unit)
    prune(store, GARBAGE)
    assert store.read_artifact(unit.artifact) == b"one"


def test_what_a_later_vllmc_refers_to_is_kept(store, warm):
    warmed = warm(b"one", b"two")
    record = store.layout.program(warmed.program.key, warmed.program.id)
    store.note_use(warmed.program.key, Counts(hits=1))
    body = record.read_bytes().split(b'"body":', 1)[1][:-2].replace(b'"guarded"', b'"later"')
    seal = sha256_hex(b"vllmc.program 2\n" + body)
    head = f'{{"format":"vllmc.program","version":2,"checksum":"{seal}","body":'
    record.write_bytes(head.encode() + body + b"}\n")
    with pytest.raises(VllmcError, match="format-too-new"):
        store.programs(warmed.program.key)
    settle(store)
    assert prune(store, ALL).removed == ()


def test_what_is_corrupt_is_left_to_verify(store, warm):
    warmed = warm(b"one", b"two")
    store.layout.unit(warmed.units[0].key).write_bytes(b"{}")
    before = store.verify()
    assert {problem.kind for problem in before} == {"corrupt-record"}
    prune(store, GARBAGE)
    assert store.verify() == before


def test_a_link_in_the_cache_is_not_followed(store, three, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    os.utime(mine, (LONG_AGO, LONG_AGO))
    store.layout.blob("ab" * 32).parent.mkdir(exist_ok=True)
    store.layout.blob("ab" * 32).symlink_to(mine)
    prune(store, ALL)
    assert mine.read_bytes() == b"mine"


def test_a_program_that_a_process_runs_is_kept_until_it_ends(store, three, start):
    program = three["old"].program
    process = start(HOLD, store.root, program.key)
    assert process.stdout.readline() == "held\n"
    settle(store)
    plan = plan_prune(store, ALL)
    assert {(item.model, item.reason) for item in plan.kept} == {("old", "a process holds it")}
    execute(plan)
    assert models(store) == ["old"]
    assert store.verify() == ()
    process.kill()
    process.wait()
    prune(store, ALL)
    assert left(store) == []


HOLD = """
import sys
from pathlib import Path
from vllmc.core.cache.store import Store
from vllmc.core.cache.usage import Counts
hold = Store(Path(sys.argv[1])).note_use(sys.argv[2], Counts(hits=1))
print("held" if hold else "not held", flush=True)
sys.stdin.read()
"""


def test_a_program_that_is_taken_up_after_the_plan_is_kept_whole(store, three, start):
    plan = plan_prune(store, ALL)
    process = start(HOLD, store.root, three["mid"].program.key)
    assert process.stdout.readline() == "held\n"
    done = execute(plan)
    assert models(store) == ["mid"]
    assert store.verify() == ()
    assert all(store.unit(unit.key) for unit in three["mid"].units)
    reasons = {(item.kind, item.reason) for item in done.kept}
    assert ("program", "a process holds it") in reasons
    assert ("artifact", "a program that is stored by now needs it") in reasons


def test_a_program_that_was_used_after_the_plan_is_kept(store, three):
    plan = plan_prune(store, ALL)
    store.note_use(three["mid"].program.key, Counts(hits=1)).release()
    done = execute(plan)
    assert models(store) == ["mid"]
    assert {item.reason for item in done.kept if item.kind == "program"} == {
        "it was used or stored again since the plan was made"
    }


def test_a_program_that_is_stored_after_the_plan_keeps_what_it_needs(store, three, make_program):
    plan = plan_prune(store, ALL)
    store.put_program(make_program(three["old"].units, model="newest"))
    execute(plan)
    assert models(store) == ["newest"]
    assert store.verify() == ()


def test_what_is_found_or_stored_again_after_the_plan_is_kept(store, three):
    plan = plan_prune(store, ALL)
    unit = three["old"].units[0]
    store.retain(unit.artifact, b"old")
    done = execute(plan)
    assert kinds(done.kept) == [("artifact", unit.artifact)]
    assert store.read_artifact(unit.artifact) == b"old"


REFRESHED = """
import os, sys
from pathlib import Path
from vllmc.core.cache.prune import execute, plan_prune
from vllmc.core.cache.retention import Criteria
from vllmc.core.cache.store import Store
store, digest = Store(Path(sys.argv[1])), sys.argv[2]
plan = plan_prune(store, Criteria(max_count=0))
def hook(event, arguments):
    if event == "os.rename" and os.fspath(arguments[0]) == str(store.layout.blob(digest)):
        store.retain(digest, b"")
sys.addaudithook(hook)
done = execute(plan)
print([item.key for item in done.kept] == [digest], len(store.read_artifact(digest)))
"""


def test_what_is_found_at_the_very_moment_of_its_removal_is_put_back(store, three, start):
    unit = three["old"].units[0]
    out, _ = start(REFRESHED, store.root, unit.artifact).communicate()
    assert out == "True 3\n"


def test_what_is_gone_by_now_is_neither_removed_nor_kept(store, three):
    first, second = (plan_prune(store, ALL) for _ in range(2))
    assert execute(first).removed == first.removals
    done = execute(second)
    assert (done.removed, done.kept) == ((), ())


@contextmanager
def moved(store, directories, files):
    """The cache where an unprivileged user gets at it, with these modes."""
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        target = Path(root) / "cache"
        store.root.rename(target)
        for path in (target, *target.rglob("*")):
            path.chmod(directories if path.is_dir() else files)
        yield target


def test_a_cache_that_cannot_be_written_is_not_pruned(store, three, start):
    with moved(store, 0o555, 0o444) as target:
        out, _ = start(UNPRIVILEGED, target).communicate()
        assert out == "not-writable\n"
        assert len(Store(target).entries()) == 3


def test_what_dead_processes_left_goes_after_an_hour(store, three):
    path = store.layout.lock("x")
    path.parent.mkdir()
    path.write_text("of a process that died")
    draft = store.layout.temporary / "1.ab"
    draft.write_text("half a fi")
    for age, removed in ((3000, []), (4000, [("temporary", "x"), ("temporary", "1.ab")])):
        for left_behind in (path, draft):
            os.utime(left_behind, (time.time() - age,) * 2)
        done = prune(store, GARBAGE)
        assert kinds(done.removed) == removed
    assert {item.reason for item in done.removed} == {"a process that died left it"}


def test_a_lease_that_is_held_stays(store, three):
    with store.lock("x", pytest.fail):
        assert prune(store, GARBAGE).removed == ()
        assert store.request("x").attempt() is None


def test_a_note_of_an_import_goes_with_the_last_of_its_programs(store, three):
    keys = [three[name].program.key for name in ("old", "new")]
    note_import(store, "ab" * 32, keys, Vouched(name="", key=""), "a.vllmc")
    os.utime(store.layout.imported("ab" * 32), (LONG_AGO, LONG_AGO))
    assert "import" not in {item.kind for item in prune(store, Criteria(max_count=1)).removed}
    done = prune(store, ALL)
    assert "import" in {item.kind for item in done.removed}
    assert left(store) == []


def test_facts_that_nobody_asks_for_go_after_a_month(store, three):
    for name, days in (("asked-for", 40), ("fresh", 20), ("forgotten", 40)):
        facts.remember(store.root, name, "it")
        os.utime(store.layout.fact(name), (time.time() - days * 86400,) * 2)
    assert facts.recall(store.root, "asked-for") == "it"
    done = prune(store, GARBAGE)
    assert kinds(done.removed) == [("fact", "forgotten")]
    assert done.kept == ()


def test_what_another_user_stored_goes_where_directories_allow_it(store, three, start):
    with moved(store, 0o777, 0o644) as target:
        out, _ = start(UNPRIVILEGED, target).communicate()
        assert out == ""
        assert Store(target).entries() == ()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from vllmc.core.cache.prune import execute, plan_prune
from vllmc.core.cache.retention import Criteria
from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    execute(plan_prune(Store(Path(sys.argv[1])), Criteria(max_count=0)))
except VllmcError as error:
    print(error.code)
"""


NAMES = ("a", "b", "c", "d")
ARTIFACTS = tuple(bytes([65 + n]) * (1000 * (n + 1)) for n in range(5))
CRITERIA = st.builds(
    Criteria,
    max_bytes=st.none() | st.integers(0, 20_000),
    older_than=st.none() | st.integers(0, 6).map(lambda days: days * 86400 + 3600),
    max_count=st.none() | st.integers(0, 4),
    other_torch=st.none() | st.sampled_from(["1", "2"]),
)
ORPHANS = st.dictionaries(st.integers(0, 3), st.booleans())
PROGRAMS = st.dictionaries(
    st.sampled_from(NAMES),
    st.tuples(
        st.sets(st.sampled_from(ARTIFACTS), min_size=1),
        st.integers(0, 6),
        st.sampled_from(["1", "2"]),
        st.booleans(),
    ),
)


def check_a_prune(programs, criteria, orphans, make_unit, make_program):
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        records, days, holds, young = {}, {}, {}, set()
        for name, (artifacts, _, torch, _) in programs.items():
            units = [make_unit(artifact) for artifact in sorted(artifacts)]
            for artifact, unit in zip(sorted(artifacts), units, strict=True):
                store.put_artifact(artifact)
                store.put_unit(unit)
            factors = (
                Factor(group="model", name="name", value=name),
                Factor(group="versions", name="torch", value=torch, origin="probe"),
            )
            records[name] = make_program(tuple(units), model=name, factors=factors)
            store.put_program(records[name])
        settle(store)
        for name, (_, age, _, held) in programs.items():
            days[name] = age
            hold = store.note_use(records[name].key, Counts(hits=1))
            if held:
                holds[name] = hold
            hold = None
            when = time.time() - age * 86400
            os.utime(store.layout.used(records[name].key), (when, when))
        for number, is_young in orphans.items():
            digest = store.put_artifact(b"orphan %d" % number)
            if is_young:
                young.add(digest)
            else:
                os.utime(store.layout.blob(digest), (LONG_AGO, LONG_AGO))

        plan = plan_prune(store, criteria)
        done = execute(plan)

        assert done.removed == plan.removals
        assert store.verify() == ()
        stay = {entry.model for entry in store.entries()}
        assert set(holds) <= stay
        for name in stay:
            for unit in records[name].units:
                assert store.unit(unit.key) is not None
        sizes = [p.stat().st_size for p in store.root.rglob("*") if p.is_file()]
        assert sum(sizes) == plan.bytes_after
        free = stay - set(holds)
        if criteria.max_bytes is not None and free:
            assert plan.bytes_after <= criteria.max_bytes
        if criteria.max_count is not None:
            assert len(stay) <= criteria.max_count or not free
        if criteria.older_than is not None:
            assert all(days[name] * 86400 <= criteria.older_than for name in free)
        if criteria.other_torch is not None:
            assert all(programs[name][2] == criteria.other_torch for name in free)
        else:
            gone = programs.keys() - stay
            assert all(days[old] >= days[new] for old in gone for new in free)
        if criteria == GARBAGE:
            assert stay == programs.keys()
        for digest in {sha256_hex(b"orphan %d" % number) for number in orphans}:
            assert store.layout.blob(digest).exists() == (digest in young)
        again = plan_prune(store, criteria)
        assert again.removals == ()
        assert again.bytes_after == plan.bytes_after


ASKED = given(programs=PROGRAMS, criteria=CRITERIA, orphans=ORPHANS)
UNHURRIED = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(UNHURRIED, max_examples=20)
@ASKED
def test_whatever_is_asked_what_stays_is_whole(
    programs, criteria, orphans, make_unit, make_program
):
    check_a_prune(programs, criteria, orphans, make_unit, make_program)


@pytest.mark.thorough
@settings(UNHURRIED, max_examples=1000)
@ASKED
def test_whatever_is_asked_a_thousand_times(programs, criteria, orphans, make_unit, make_program):
    check_a_prune(programs, criteria, orphans, make_unit, make_program)


# Kills itself at the n-th file operation of a prune, for n = 0, 1, ... until it lives.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from vllmc.core.cache.prune import execute, plan_prune
from vllmc.core.cache.retention import Criteria
from vllmc.core.cache.store import Store

def die_at(moment):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in ("os.rename", "os.remove", "os.rmdir"):
            seen += 1
            if seen > moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

root, model = Path(sys.argv[1]), Path(sys.argv[2])
for moment in range(1000):
    store = Store(root / str(moment))
    shutil.copytree(model, store.root)
    plan = plan_prune(store, Criteria(max_count=1))
    child = os.fork()
    if child == 0:
        die_at(moment)
        execute(plan)
        os._exit(0)
    died = os.waitpid(child, 0)[1] != 0
    assert store.verify() == (), (moment, store.verify())
    assert "new" in {entry.model for entry in store.entries()}
    execute(plan_prune(store, Criteria(max_count=1)))
    assert [entry.model for entry in store.entries()] == ["new"]
    assert store.stats().unreferenced_bytes == 0 and store.stats().artifacts == 2
    shutil.rmtree(store.root)
    if not died:
        break
print(moment)
"""


def test_a_prune_that_is_killed_anywhere_leaves_a_sound_cache(store, three, start, tmp_path):
    process = start(KILLED, tmp_path / "killed", store.root)
    out, _ = process.communicate()
    assert process.returncode == 0
    # Two programs with two files each, two units, two notes and two artifacts: each is moved and
    # then removed, and each program's directory as well.
    assert int(out) == 2 * (4 + 6) + 2


PRUNE = """
import json, sys
from pathlib import Path
from vllmc.core.cache.prune import execute, plan_prune
from vllmc.core.cache.retention import Criteria
from vllmc.core.cache.store import Store
plan = plan_prune(Store(Path(sys.argv[1])), Criteria(max_count=2))
print("planned", flush=True)
sys.stdin.readline()
print(json.dumps([item.path for item in execute(plan).removed]), flush=True)
"""


def test_of_two_prunes_at_once_each_removes_what_the_other_did_not(store, warm, start):
    for number in range(12):
        warm(b"own %d" % number, b"shared", model=f"model {number}")
    settle(store)
    plan = plan_prune(store, Criteria(max_count=2))
    both = [start(PRUNE, store.root) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "planned\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    removed = [path for process in both for path in json.loads(process.communicate()[0])]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(removed) == sorted(item.path for item in plan.removals)
    assert len(store.entries()) == 2
    assert store.verify() == ()


PUBLISH = """
import sys
from pathlib import Path
from vllmc.core.cache.record import decode
from vllmc.core.cache.store import Store
from vllmc.core.cache.usage import Counts
store, rounds = Store(Path(sys.argv[1])), int(sys.argv[2])
records = [decode(Path(path).read_bytes()) for path in sys.argv[3:]]
units, programs = records[:2], records[2:]
data = {unit.artifact: name for unit, name in zip(units, (b"one", b"two"))}
print("ready", flush=True)
for number in range(rounds):
    program = programs[number % len(programs)]
    for unit in units:
        store.put_artifact(data[unit.artifact])
        store.put_unit(unit)
    hold = store.note_use(program.key, Counts(misses=2))
    for unit in units:
        store.retain(unit.artifact, data[unit.artifact])
    store.put_program(program)
    assert store.programs(program.key) == (program,)
    for unit in program.units:
        store.read_artifact(unit.artifact)
    hold.release()
print("done", flush=True)
"""


def test_what_is_published_during_a_prune_is_whole(store, make_unit, make_program, start, tmp_path):
    units = tuple(make_unit(name) for name in (b"one", b"two"))
    records = [*units, *(make_program(units, model=f"model {n}") for n in range(2))]
    paths = []
    for number, record in enumerate(records):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(encode(record))
        assert decode(paths[-1].read_bytes()) == record
    process = start(PUBLISH, store.root, 60, *paths)
    assert process.stdout.readline() == "ready\n"
    removed = 0
    while process.poll() is None:
        removed += len(prune(store, Criteria(max_count=1)).removed)
    assert process.stdout.read() == "done\n"
    assert process.returncode == 0
    assert store.verify() == ()
    assert removed > 0
