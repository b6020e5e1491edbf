"""Programs to remotes and from them: what moves, what breaks off, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from future import of_version_2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import serving

from vllmc.core.cache import partial, transfer
from vllmc.core.cache.exchange import imports_of
from vllmc.core.cache.files import MOST_RECORD
from vllmc.core.cache.record import encode
from vllmc.core.cache.remote import Connection, CorruptRemote, Remote
from vllmc.core.cache.signing import generate, public_text
from vllmc.core.cache.store import Store
from vllmc.core.cache.transfer import downloaded, pull, push
from vllmc.core.cache.trust import Trust, Untrusted
from vllmc.core.cache.trust_store import add_key
from vllmc.core.errors import VllmcError
from vllmc.core.events import SilentObserver

KEY, OTHER = generate(), generate()
ANY = Trust(unsigned=True)
LARGE = random.Random(0).randbytes(2_500_000)
SILENT = SilentObserver()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture
def remote(place: Path) -> Remote:
    return Remote(url=f"file://{place}")


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store(tmp_path / "target", trust=ANY)


@pytest.fixture
def pushed(store, warm, remote):
    """A program of two units, which the remote holds unsigned."""
    warmed = warm(b"one", LARGE)
    push(remote, store, [warmed.program], SILENT)
    return warmed


def published(store: Store) -> list[str]:
    """What a store holds that readers look at: everything but the beginnings of downloads."""
    top = store.layout.top
    return sorted(
        path.relative_to(top).as_posix()
        for path in top.rglob("*")
        if path.is_file() and path.parent.name != "tmp"
    )


def records(store: Store) -> list[str]:
    return [path for path in published(store) if path.startswith(("units", "programs", "imports"))]


@pytest.mark.parametrize("kind", ["file", "directory", "memory"])
def test_what_is_pushed_is_pulled_and_only_once(kind, store, warm, place, target):
    urls = {"file": f"file://{place}", "directory": str(place), "memory": f"memory://{place}"}
    remote = Remote(url=urls[kind])
    warmed = warm(b"one", LARGE)
    sent = push(remote, store, [warmed.program], SILENT)
    assert (sent.files, sent.skipped, sent.programs) == (5, 0, (warmed.program.key,))
    assert push(remote, store, [warmed.program], SILENT).files == 0
    got = pull(remote, target, [], SILENT)
    assert (got.files, got.bytes, got.skipped) == (5, sent.bytes, 0)
    assert target.programs(warmed.program.key) == (warmed.program,)
    assert [target.unit(unit.key) for unit in warmed.units] == list(warmed.units)
    assert target.read_artifact(warmed.units[1].artifact) == LARGE
    assert target.verify() == ()
    again = pull(remote, target, [], SILENT)
    assert (again.files, again.bytes, again.skipped) == (0, 0, 5)
    (note,) = imports_of(target, warmed.program.key)
    assert note.source == remote.name


def test_what_programs_share_moves_once(store, warm, remote, target, pushed):
    other = warm(LARGE, model="other")
    sent = push(remote, store, [other.program], SILENT)
    assert (sent.files, sent.skipped) == (1, 2)
    assert pull(remote, target, ["other"], SILENT).files == 3
    assert pull(remote, target, ["tiny-llama"], SILENT).files == 3
    both = pull(remote, Store(target.root.with_name("both"), trust=ANY), [], SILENT)
    assert (both.files, both.skipped) == (6, 0)
    assert {record.model for record in target.readable_programs()} == {"other", "tiny-llama"}


def test_a_remote_can_be_mounted_as_a_layer(store, pushed, place, tmp_path):
    layered = Store(tmp_path / "first", (place,))
    assert layered.programs(pushed.program.key) == (pushed.program,)
    assert layered.read_artifact(pushed.units[1].artifact) == LARGE
    assert Store(place).verify() == ()


def test_names_are_keys_their_beginnings_or_models(remote, target, pushed, store, warm):
    key = pushed.program.key
    assert pull(remote, target, [key[:8].upper()], SILENT).programs == (key,)
    assert pull(remote, target, ["tiny-llama"], SILENT).programs == (key,)
    for name in ("unknown", "0123456789"):
        with pytest.raises(VllmcError, match="holds no program called") as caught:
            pull(remote, target, [name], SILENT)
        assert caught.value.code == "unknown-key"


def test_a_beginning_of_two_keys_is_ambiguous(remote, place, target, pushed):
    key = pushed.program.key
    twin = key[:-1] + ("0" if key[-1] != "0" else "1")
    (place / f"v1/programs/{key[:2]}/{twin}").mkdir()
    name = "f" * 64
    (place / f"v1/programs/{key[:2]}/{twin}/{name}.json").write_text("")
    with pytest.raises(VllmcError) as caught:
        pull(remote, target, [key[:8]], SILENT)
    assert caught.value.code == "ambiguous-key"
    assert not target.root.exists()


def test_what_is_signed_is_used_by_who_trusts_the_key(store, warm, remote, tmp_path):
    trust = Trust(keys=tmp_path / "trust")
    target = Store(tmp_path / "target", trust=trust)
    warmed = warm(b"one")
    push(remote, dataclasses.replace(store, signing=KEY), [warmed.program], SILENT)
    done = pull(remote, target, [], SILENT)
    assert [error.code for error in done.refused] == ["untrusted"]
    assert published(target) == []
    add_key(trust, public_text(KEY.public, "release"), "release", "here")
    assert pull(remote, target, [], SILENT).files == 3
    (note,) = imports_of(target, warmed.program.key)
    assert note.signed_by == "release"


def test_a_signature_that_is_there_goes_along_and_who_signs_signs_what_was_read(
    store, warm, remote, place
):
    signed = dataclasses.replace(store, signing=KEY)
    warmed = warm(b"one")
    signed.put_unit(warmed.units[0])
    push(remote, store, [warmed.program], SILENT)
    path = store.layout.unit(warmed.units[0].key).relative_to(store.root)
    assert (place / path).read_bytes() == KEY.signed(encode(warmed.units[0]))
    (place / path).unlink()
    push(remote, dataclasses.replace(store, signing=OTHER), [warmed.program], SILENT)
    assert (place / path).read_bytes() == OTHER.signed(encode(warmed.units[0]))


def test_unsigned_is_refused_before_it_is_parsed(remote, place, tmp_path, pushed):
    target = Store(tmp_path / "target", trust=Trust(keys=tmp_path / "trust"))
    done = pull(remote, target, [], SILENT)
    assert [error.exit_code for error in done.refused] == [4]
    (path,) = (place / "v1/programs").rglob("*.json")
    path.write_text("[" * 100_000)
    (error,) = pull(remote, target, [], SILENT).refused
    assert (error.code, error.context["reason"]) == ("untrusted", "it is not signed")
    assert f"file://{path}" in error.message
    with pytest.raises(Untrusted):
        pull(remote, target, ["tiny-llama"], SILENT)
    assert published(target) == []


def test_one_program_that_is_refused_does_not_stop_the_others(
    remote, place, target, store, warm, pushed
):
    other = warm(b"three", model="other")
    push(remote, store, [other.program], SILENT)
    (path,) = (place / "v1/programs").rglob(f"{other.program.key}/*.json")
    path.write_bytes(path.read_bytes()[:-2])
    done = pull(remote, target, [], SILENT)
    assert done.programs == (pushed.program.key,)
    assert [error.code for error in done.refused] == ["corrupt-remote"]
    assert pull(remote, target, ["tiny-llama"], SILENT).refused == ()


@pytest.mark.parametrize("section", ["blobs", "units", "programs"])
@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "empty", "missing", "swapped"])
def test_what_is_tampered_with_is_refused_and_nothing_is_published(
    section, how, remote, place, target, pushed
):
    paths = sorted(p for p in (place / "v1" / section).rglob("*") if p.is_file())
    path = paths[0]
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        last = paths[-1].read_bytes() if section != "programs" else encode(pushed.units[0])
        path.write_bytes(
            {
                "flipped": data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :],
                "cut": data[:-1],
                "longer": data + b"\n",
                "empty": b"",
                "swapped": last,
            }[how]
        )
    if (section, how) == ("programs", "missing"):
        assert pull(remote, target, [], SILENT).programs == ()
    elif (section, how) == ("blobs", "longer"):
        # As much as the record says is read, and that is right.
        assert pull(remote, target, [], SILENT).files == 5
        assert target.verify() == ()
        return
    else:
        done = pull(remote, target, [], SILENT)
        assert [(e.code, e.exit_code) for e in done.refused] == [("corrupt-remote", 4)]
        assert done.programs == ()
        assert place.name in done.refused[0].message
    assert records(target) == []
    assert [problem.kind for problem in target.verify() if problem.unsafe] == []


def test_a_record_without_end_is_refused(remote, place, target, pushed):
    (path,) = (place / "v1/programs").rglob("*.json")
    with path.open("r+b") as file:
        file.truncate(MOST_RECORD + 1)
    (error,) = pull(remote, target, [], SILENT).refused
    assert "more than 32 MiB" in error.message


@pytest.mark.parametrize("writes", range(5))
def test_a_push_that_breaks_off_leaves_nothing_that_refers_to_what_is_not_there(
    writes, store, warm, remote, place, monkeypatch
):
    warmed = warm(b"one", LARGE)
    write, left = Connection.write, [writes]

    def breaks(connection: Connection, path: str, data: bytes) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(connection, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "write", breaks)
        with pytest.raises(KeyboardInterrupt):
            push(remote, store, [warmed.program], SILENT)
    there = Store(place)
    assert len(published(there)) == writes
    assert [problem for problem in there.verify() if problem.unsafe] == []
    for unit in there.readable_units():
        assert there.artifact_size(unit.artifact) == unit.bytes
    done = push(remote, store, [warmed.program], SILENT)
    assert (done.files, done.skipped) == (5 - writes, writes)
    assert there.programs(warmed.program.key) == (warmed.program,)


@pytest.mark.parametrize("at", ["", "/v1", "/v1/blobs"])
def test_a_push_to_where_no_directory_can_be_has_failed(at, store, warm, remote, place):
    file = Path(f"{place}{at}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a file")
    with pytest.raises(VllmcError) as caught:
        push(remote, store, [warm(b"one").program], SILENT)
    assert (caught.value.code, caught.value.exit_code) == ("remote-failed", 1)
    assert file.read_text() == "a file"


def test_an_artifact_of_another_size_is_sent_again(store, remote, place, pushed):
    path = place / Path(store.layout.blob(pushed.units[1].artifact)).relative_to(store.root)
    path.write_bytes(LARGE[:1000])
    assert push(remote, store, [pushed.program], SILENT).files == 1
    assert path.read_bytes() == LARGE


@pytest.mark.parametrize("section", ["units", "programs"])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "another", "too large"])
def test_a_record_that_cannot_be_used_is_pushed_again(
    section, how, store, remote, place, target, pushed
):
    path = min((place / "v1" / section).rglob("*.json"))
    data = path.read_bytes()
    other = pushed.program if section == "units" else pushed.units[0]
    path.write_bytes(
        {
            "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "cut": data[:-1],
            "empty": b"",
            "another": encode(other),
            "too large": b"",
        }[how]
    )
    if how == "too large":
        os.truncate(path, MOST_RECORD + 1)
    (error,) = pull(remote, target, [], SILENT).refused
    assert (error.code, "push it again" in error.hint) == ("corrupt-remote", True)
    done = push(remote, store, [pushed.program], SILENT)
    assert (done.files, done.skipped) == (1, 4)
    assert path.read_bytes() == data
    assert pull(remote, target, [], SILENT).refused == ()
    assert target.programs(pushed.program.key) == (pushed.program,)


def test_a_record_that_names_what_is_not_there_is_pushed_again(
    store, remote, place, target, pushed
):
    unit = dataclasses.replace(pushed.units[0], artifact="e" * 64)
    there = Store(place)
    there.put_unit(unit)
    assert pull(remote, target, [], SILENT).programs == ()
    assert push(remote, store, [pushed.program], SILENT).files == 1
    assert there.unit(unit.key) == pushed.units[0]
    # Of one whose artifact is there, another machine's, nothing is changed.
    unit = dataclasses.replace(unit, artifact=there.put_artifact(b"compiled elsewhere"))
    there.put_unit(unit)
    assert push(remote, store, [pushed.program], SILENT).files == 0
    assert there.unit(unit.key) == unit


def test_a_record_of_a_later_vllmc_stays(store, remote, place, target, pushed):
    path = place / store.layout.program(pushed.program.key, pushed.program.id).relative_to(
        store.root
    )
    later = of_version_2(path.read_bytes())
    path.write_bytes(later)
    assert push(remote, store, [pushed.program], SILENT).files == 0
    assert path.read_bytes() == later
    (error,) = pull(remote, target, [], SILENT).refused
    assert error.hint.startswith("upgrade vllmc")


def test_a_signed_push_replaces_what_nobody_signed_who_is_trusted(
    store, remote, place, pushed, tmp_path
):
    trust = Trust(keys=tmp_path / "trust")
    add_key(trust, public_text(OTHER.public, "other"), "other", "here")
    ours, others = (dataclasses.replace(store, signing=key, trust=trust) for key in (KEY, OTHER))
    target = Store(tmp_path / "target", trust=trust)
    assert pull(remote, target, [], SILENT).programs == ()
    for signing, files in ((others, 3), (ours, 0), (others, 0), (store, 0)):
        assert push(remote, signing, [pushed.program], SILENT).files == files
        assert push(remote, signing, [pushed.program], SILENT).files == 0
    assert pull(remote, target, [], SILENT).programs == (pushed.program.key,)
    stranger = dataclasses.replace(store, signing=generate(), trust=Trust(keys=tmp_path / "none"))
    assert push(remote, stranger, [pushed.program], SILENT).files == 3


def test_what_is_pulled_keeps_its_signature(store, warm, remote, place, tmp_path):
    trust = Trust(keys=tmp_path / "trust")
    add_key(trust, public_text(KEY.public, "release"), "release", "here")
    warmed = warm(b"one")
    push(remote, dataclasses.replace(store, signing=KEY), [warmed.program], SILENT)
    target = Store(tmp_path / "target", trust=trust)
    pull(remote, target, [], SILENT)
    assert target.verify() == ()
    # Where others may write it is used still, and can be pushed on.
    target.root.chmod(0o777)
    assert target.programs(warmed.program.key) == (warmed.program,)
    push(Remote(url=str(tmp_path / "mirror")), target, [warmed.program], SILENT)
    assert records(Store(tmp_path / "mirror")) == records(Store(place))
    for path in records(Store(place)):
        assert (tmp_path / "mirror/v1" / path).read_bytes() == (place / "v1" / path).read_bytes()
    # Who signs signs what is pulled.
    own = Store(tmp_path / "own", trust=trust, signing=OTHER)
    pull(remote, own, [], SILENT)
    assert own.layout.unit(warmed.units[0].key).read_bytes() == OTHER.signed(
        encode(warmed.units[0])
    )


def test_signed_is_what_all_of_it_is(store, warm, remote, place, tmp_path):
    trust = Trust(keys=tmp_path / "trust", unsigned=True)
    add_key(trust, public_text(KEY.public, "release"), "release", "here")
    warmed = warm(b"one")
    push(remote, dataclasses.replace(store, signing=KEY), [warmed.program], SILENT)
    Store(place).put_unit(warmed.units[0])
    target = Store(tmp_path / "target", trust=trust)
    pull(remote, target, [], SILENT)
    (note,) = imports_of(target, warmed.program.key)
    assert (note.signed_by, note.key) == ("", "")


def test_what_a_layer_below_may_not_be_used_for_is_pulled(remote, pushed, tmp_path):
    below = Store(tmp_path / "below", trust=ANY)
    pull(remote, below, [], SILENT)
    below.root.chmod(0o777)
    trusting = Store(tmp_path / "first", (below.root,), trust=ANY)
    assert pull(remote, trusting, [], SILENT).files == 0
    add_key(trust := Trust(keys=tmp_path / "trust"), public_text(KEY.public, "key"), "key", "here")
    signed = Store(tmp_path / "signed", signing=KEY)
    pull(remote, dataclasses.replace(signed, trust=ANY), [], SILENT)
    push(remote, signed, [pushed.program], SILENT)
    layered = Store(tmp_path / "second", (below.root,), trust=trust)
    # The artifacts are what their names say, whoever wrote them.
    assert pull(remote, layered, [], SILENT).files == 3
    assert layered.programs(pushed.program.key) == (pushed.program,)
    assert layered.unit(pushed.units[0].key) == pushed.units[0]


def test_what_is_here_is_safe_from_a_prune_while_the_rest_comes(remote, target, pushed):
    digest = target.put_artifact(LARGE)
    os.utime(target.layout.blob(digest), (0, 0))
    pull(remote, target, [], SILENT)
    assert target.layout.blob(digest).stat().st_mtime > 0


def test_a_beginning_that_is_there_is_gone_on_from(remote, target, pushed, monkeypatch):
    part = target.layout.temporary / f"{pushed.units[1].artifact}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(LARGE[:100_000])
    starts = []
    opened = Connection.open

    def watched(connection, path, start=0):
        starts.append(start)
        return opened(connection, path, start)

    monkeypatch.setattr(Connection, "open", watched)
    pull(remote, target, [], SILENT)
    assert 100_000 in starts
    assert target.read_artifact(pushed.units[1].artifact) == LARGE
    assert not part.exists()


@pytest.mark.parametrize("wrong", [b"x" * 1000, LARGE[:-1] + b"x", LARGE + b"x", b""])
def test_a_wrong_beginning_is_started_over(wrong, remote, target, pushed):
    part = target.layout.temporary / f"{pushed.units[1].artifact}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(wrong)
    pull(remote, target, [], SILENT)
    assert target.read_artifact(pushed.units[1].artifact) == LARGE


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "hard link"])
def test_what_is_no_beginning_is_left_alone(kind, remote, target, pushed, tmp_path):
    part = target.layout.temporary / f"{pushed.units[1].artifact}.part"
    part.parent.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    if kind == "link":
        part.symlink_to(precious)
    elif kind == "hard link":
        os.link(precious, part)
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.mkdir()
    pull(remote, target, [], SILENT)
    assert target.read_artifact(pushed.units[1].artifact) == LARGE
    assert precious.read_bytes() == b"mine"
    assert sorted(target.layout.temporary.iterdir()) == [part]


def test_a_corrupt_artifact_here_is_fetched_again(remote, target, pushed):
    pull(remote, target, [], SILENT)
    target.layout.blob(pushed.units[0].artifact).write_bytes(b"two")
    assert pull(remote, target, [], SILENT).files == 2
    assert target.verify() == ()


def test_many_pulls_at_once_do_not_disturb_each_other(place, target, pushed):
    remote = Remote(url=str(place), chunk=100_000)
    start = threading.Barrier(4)

    def work() -> tuple[str, ...]:
        start.wait()
        return pull(remote, target, [], SILENT).programs

    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(work) for _ in range(4)]
    assert [future.result() for future in done] == [(pushed.program.key,)] * 4
    assert target.verify() == ()
    assert target.programs(pushed.program.key) == (pushed.program,)
    assert list(target.layout.temporary.iterdir()) == []


PULL_AND_DIE = """
import os, signal, sys
from pathlib import Path
from vllmc.core.cache.remote import Reading, Remote
from vllmc.core.cache.store import Store
from vllmc.core.cache.transfer import pull
from vllmc.core.cache.trust import Trust
from vllmc.core.events import SilentObserver

remote, root, name, left = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
owner = Reading if name == "read" else Store
method = getattr(owner, name)

def dies(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*args)

setattr(owner, name, dies)
store = Store(root, trust=Trust(unsigned=True))
pull(Remote(url=remote, chunk=100_000), store, [], SilentObserver())
"""


@pytest.mark.parametrize("at", [("read", 20), ("put_unit", 1), ("put_program", 0)])
def test_a_pull_that_is_killed_leaves_nothing_wrong_and_the_next_goes_on(
    at, place, remote, target, pushed, start
):
    assert start(PULL_AND_DIE, place, target.root, *at).wait() == -9
    assert [problem for problem in target.verify() if problem.unsafe] == []
    assert list(target.readable_programs()) == []
    part = target.layout.temporary / f"{pushed.units[1].artifact}.part"
    assert part.exists() == (at[0] == "read")
    done = pull(remote, target, [], SILENT)
    assert (done.programs, done.refused) == ((pushed.program.key,), ())
    assert target.programs(pushed.program.key) == (pushed.program,)
    assert target.verify() == ()
    assert not part.exists()


def test_a_full_disk_is_said_before_anything_is_fetched(remote, target, pushed, monkeypatch):
    monkeypatch.setattr(partial, "_SPARE", 1 << 62)
    with pytest.raises(VllmcError) as caught:
        pull(remote, target, [], SILENT)
    assert caught.value.code == "disk-full"
    assert records(target) == []
    with pytest.raises(VllmcError) as caught, downloaded(remote, target, SILENT):
        raise AssertionError
    assert caught.value.code in ("disk-full", "remote-failed")


NAMES = st.one_of(
    st.sampled_from(["..", "../..", "/etc/passwd", "v1", ".", "", "%2e%2e", "a/b", "\0", "-"]),
    st.text(max_size=70),
    st.from_regex(r"[0-9a-f]{2}(/|\\)[0-9a-f]{64}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{2}|[0-9a-f]{64}(\.json)?", fullmatch=True),
)


class Hostile:
    """A file system that lists anything, and holds anything."""

    def __init__(self, names: list[str], data: bytes) -> None:
        self.names, self.data = names, data

    def ls(self, path: str, detail: bool) -> list[str]:
        return [f"{path}/{name}" for name in self.names] + self.names

    def info(self, path: str) -> dict[str, int]:
        return {"size": -len(self.names)}

    def open(self, path: str, mode: str, **options: object) -> object:
        import io

        return io.BytesIO(self.data)


class Stuck(Hostile):
    """A file system that never gets to the end of what it is asked, and knows no sizes."""

    def __init__(self) -> None:
        super().__init__([], b"")
        self.freed = threading.Event()

    def info(self, path: str) -> dict[str, int]:
        return {}

    def open(self, path: str, mode: str, **options: object) -> object:
        return self

    def seek(self, at: int) -> None:
        pass

    def read(self, most: int) -> bytes:
        self.freed.wait()
        return b""

    def close(self) -> None:
        self.freed.wait()


def test_nothing_that_is_stuck_is_waited_for_beyond_its_time():
    system = Stuck()
    remote = Remote(url="memory://x", patience=0.2)
    connection = Connection(remote, system, "root", None, float("inf"))
    with pytest.raises(VllmcError, match="KeyError"):
        connection.size("blobs")
    started = time.monotonic()
    with pytest.raises(VllmcError, match="no answer"):
        connection.read_record("units")
    assert time.monotonic() - started < 5
    system.freed.set()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, max_size=4), data=st.binary(max_size=40))
def test_whatever_a_remote_lists_nothing_comes_of_it(names, data, tmp_path):
    target = Store(tmp_path / "target", trust=ANY)
    remote = Remote(url="memory://x")
    connection = Connection(remote, Hostile(names, data), "root", None, float("inf"))
    puller = transfer._Puller(connection, target, SILENT)
    for path in puller.listed(()):
        assert path.count("/") == 3
        assert ".." not in path
        with suppress(CorruptRemote):
            puller.program(path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with suppress(CorruptRemote):
        puller._artifact("0" * 64, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({*before, "target"})
    assert published(target) == []


def test_notes_of_where_it_came_from_hold_no_credentials(target, pushed, place, store):
    remote = Remote(url=f"memory://user:s3cret@{place}?token=hush")
    with suppress(VllmcError):
        push(remote, store, [pushed.program], SILENT)
        pull(remote, target, [], SILENT)
    for path in target.root.rglob("*.json"):
        assert "s3cret" not in path.read_text()
        assert "hush" not in path.read_text()
    assert "s3cret" not in json.dumps([remote.name, repr(remote)])


class TestHttp:
    @pytest.fixture
    def served(self, place, pushed):
        pytest.importorskip("aiohttp")
        with serving(place) as served:
            yield served

    def test_programs_are_pulled_from_a_server_that_lists_directories(self, served, target, pushed):
        done = pull(Remote(url=served.url), target, [], SILENT)
        assert done.files == 5
        assert target.programs(pushed.program.key) == (pushed.program,)

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_transfer_that_breaks_off_goes_on(self, ranges, served, target, pushed):
        digest = pushed.units[1].artifact
        served.cut, served.after, served.ranges = digest, 2_000_000, ranges
        remote = Remote(url=served.url, chunk=100_000)
        with pytest.raises(VllmcError) as caught:
            pull(remote, target, [], SILENT)
        assert caught.value.code == "remote-failed"
        assert records(target) == []
        part = target.layout.temporary / f"{digest}.part"
        size = part.stat().st_size
        assert 0 < size <= 2_000_000
        assert LARGE.startswith(part.read_bytes())
        served.cut = ""
        served.asked.clear()
        pull(remote, target, [], SILENT)
        assert [r for p, r in served.asked if digest in p] == [f"bytes={size}-"]
        assert target.programs(pushed.program.key) == (pushed.program,)
        assert target.verify() == ()

    def test_a_beginning_that_is_longer_than_what_is_there_is_started_over(
        self, served, place, target, pushed
    ):
        digest = pushed.units[1].artifact
        part = target.layout.temporary / f"{digest}.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(LARGE[:1000])
        path = place / target.layout.blob(digest).relative_to(target.root)
        path.write_bytes(LARGE[:500])
        (error,) = pull(Remote(url=served.url), target, [], SILENT).refused
        assert error.code == "corrupt-remote"
        path.write_bytes(LARGE)
        assert pull(Remote(url=served.url), target, [], SILENT).refused == ()

    def test_a_server_that_is_down_or_slow_has_failed(self, served, target, tmp_path):
        served.delay = 0.5
        slow = Remote(url=served.url, patience=0.1)
        down = Remote(url="http://user:s3cret@127.0.0.1:9/x?token=hush")
        for remote in (slow, down):
            with pytest.raises(VllmcError) as caught:
                pull(remote, target, [], SILENT)
            assert caught.value.code == "remote-failed"
            assert caught.value.exit_code == 1
            assert remote.name in caught.value.message
            told = f"{caught.value.message} {caught.value.context} {caught.value.hint}"
            assert "s3cret" not in told
            assert "hush" not in told
        assert published(target) == []

    def test_all_of_it_may_take_only_so_long(self, served, target):
        served.delay = 0.1
        with pytest.raises(VllmcError, match="seconds"):
            pull(Remote(url=served.url, within=0.3), target, [], SILENT)

    def test_user_and_password_of_the_url_are_used(self, served, target, pushed):
        served.user = "user"
        with pytest.raises(VllmcError, match="401"):
            pull(Remote(url=served.url), target, [], SILENT)
        url = served.url.replace("//", "//user:s3cret@")
        assert pull(Remote(url=url), target, [], SILENT).files == 5

    def test_it_is_read_only(self, served, store, warm):
        other = warm(b"other", model="other")
        with pytest.raises(VllmcError, match="http is only read"):
            push(Remote(url=served.url), store, [other.program], SILENT)

    def test_a_hostile_listing_names_nothing_outside(self, served, target):
        links = ("../../../etc/passwd", "/etc/passwd", "http://example.invalid/aa", "..%2f..")
        served.listing = "".join(f'<a href="{link}">x</a>' for link in links)
        assert pull(Remote(url=served.url), target, [], SILENT).files == 0
        assert {path for path, _ in served.asked} == {"/v1/programs"}
