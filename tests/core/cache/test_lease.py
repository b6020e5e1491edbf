from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.cache import lease
from vllmc.core.cache.files import open_to_lock, try_lock
from vllmc.core.cache.lease import STALE_SECONDS, Holder, Request, held
from vllmc.core.errors import VllmcError

ELSEWHERE = dataclasses.replace(Holder.this(), host="elsewhere", boot="0-0", pid=7)
LATER = 4_000_000_000_000_000_000


def caught_by(call):
    with pytest.raises(VllmcError) as caught:
        call()
    return caught.value


@pytest.fixture
def path(tmp_path):
    return tmp_path / "locks" / "x.lock"


@pytest.fixture
def ask(path, tmp_path):
    """Makes requests for the one lease of this test."""
    return lambda: Request(path, temporary=tmp_path / "tmp")


@pytest.fixture
def left_by(path):
    """Writes a lease as this holder would, and leaves it."""

    def write(holder):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(holder if isinstance(holder, bytes) else holder.contents())

    return write


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, which stands still unless it is set."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_lease_is_a_file_that_says_who_holds_it(ask, path, tmp_path):
    with held(ask(), pytest.fail, None):
        assert Holder.parse(path.read_bytes()) == Holder.this()
        second = ask()
        assert second.attempt() is None
        assert second.holder == f"process {os.getpid()} on {os.uname().nodename}"
    assert not path.exists()
    assert list((tmp_path / "tmp").iterdir()) == []


HOLDER = """
import sys
from pathlib import Path
from typing import Any
from vllmc.core.cache.store import Store
with Store(Path(sys.argv[1])).lock("x", print):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(start, store):
    holder = start(HOLDER, store.root)
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.parametrize("end", ["released", "killed"])
def test_it_is_waited_for_until_its_holder_lets_go_or_dies(store, start, end):
    holder = hold(start, store)
    waits = []

    def on_wait(who):
        waits.append(who)
        if end == "killed":
            holder.send_signal(signal.SIGKILL)
        else:
            holder.stdin.write("\n")
            holder.stdin.flush()

    with store.lock("x", on_wait):
        assert waits == [f"process {holder.pid} on {os.uname().nodename}"]
    assert holder.wait() == (-signal.SIGKILL if end == "killed" else 0)


def test_who_waits_is_told_of_each_holder(ask, left_by, path):
    waits = []
    left_by(ELSEWHERE)

    def on_wait(who):
        waits.append(who)
        if len(waits) == 1:
            left_by(dataclasses.replace(ELSEWHERE, pid=8))
        else:
            path.unlink()

    with held(ask(), on_wait, None):
        assert waits == ["process 7 on elsewhere", "process 8 on elsewhere"]


def test_it_can_be_waited_for_too_long(store, start):
    holder = hold(start, store)
    waits = []
    error = caught_by(store.lock("x", waits.append, timeout=0.01).__enter__)
    assert (error.code, len(waits)) == ("lock-timeout", 1)
    assert f"process {holder.pid} on" in error.message
    with store.lock("y", pytest.fail):
        pass


def test_an_error_under_it_is_passed_on_and_releases_it(store):
    with pytest.raises(OSError, match="mine"), store.lock("x", pytest.fail):
        raise OSError("mine")
    with store.lock("x", pytest.fail):
        pass


@pytest.mark.parametrize(
    "dead",
    [
        pytest.param({"pid": 999_999_999}, id="no such process"),
        pytest.param({"started": "1"}, id="another process of that id"),
    ],
)
def test_a_dead_process_of_this_system_is_succeeded_at_once(ask, left_by, dead):
    left_by(dataclasses.replace(Holder.this(), **dead))
    with held(ask(), pytest.fail, None):
        pass


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"boot": "0-0", "pid": 999_999_999}, id="another host"),
        pytest.param({"namespace": "1", "pid": 999_999_999}, id="another container"),
        pytest.param({"boot": "", "namespace": "", "pid": 999_999_999}, id="no /proc there"),
        pytest.param({"pid": 1, "started": ""}, id="a process, but which"),
    ],
)
def test_a_process_that_cannot_be_told_dead_has_its_time(ask, left_by, clock, other):
    holder = dataclasses.replace(Holder.this(), **other)
    left_by(holder)
    request = ask()
    assert request.attempt() is None
    assert request.holder == f"process {holder.pid} on {holder.host}"
    clock.now += STALE_SECONDS
    request.attempt().release()


def test_nothing_is_known_where_this_system_has_no_proc():
    without = dataclasses.replace(Holder.this(), boot="", namespace="", started="")
    assert not dataclasses.replace(without, pid=999_999_999).dead(without)


def test_a_holder_that_is_not_heard_of_is_succeeded_after_a_while(ask, left_by, clock, path):
    left_by(ELSEWHERE)
    request = ask()
    assert request.attempt() is None
    clock.now += STALE_SECONDS - 1
    assert request.attempt() is None
    os.utime(path, ns=(LATER, LATER))
    clock.now += 1
    assert request.attempt() is None, "it was touched meanwhile"
    clock.now += STALE_SECONDS - 1
    assert request.attempt() is None
    clock.now += 1
    taken = request.attempt()
    assert Holder.parse(path.read_bytes()) == Holder.this()
    taken.release()
    assert not path.exists()


@pytest.mark.parametrize("moments", [(LATER, 0), (0, LATER), (LATER, LATER - 10**12)])
def test_any_change_of_the_files_time_is_a_sign_of_life(ask, left_by, clock, path, moments):
    """Also one backwards: the clock of the holder's host, or the server's, may have been set."""
    left_by(ELSEWHERE)
    os.utime(path, ns=(moments[0], moments[0]))
    request = ask()
    assert request.attempt() is None
    clock.now += STALE_SECONDS - 1
    os.utime(path, ns=(moments[1], moments[1]))
    assert request.attempt() is None
    clock.now += STALE_SECONDS - 1
    assert request.attempt() is None


def test_a_successor_is_not_taken_for_who_was_there_before(ask, left_by, clock, path):
    left_by(ELSEWHERE)
    os.utime(path, ns=(LATER, LATER))
    request = ask()
    assert request.attempt() is None
    clock.now += STALE_SECONDS
    left_by(ELSEWHERE)
    os.utime(path, ns=(LATER, LATER))
    assert request.attempt() is None


@pytest.mark.parametrize(
    "contents",
    [b"", b"vllmc lease 1\n", b"vllmc lease 2\nhost x\n", b"\0" * 100, b"x" * 10_000_000],
    ids=["empty", "truncated", "future", "zeros", "huge"],
)
def test_what_cannot_be_read_is_someones_until_it_goes_stale(ask, left_by, clock, contents):
    left_by(contents)
    request = ask()
    assert request.attempt() is None
    assert request.holder == "another process"
    clock.now += STALE_SECONDS
    request.attempt().release()


@given(st.binary(max_size=300))
def test_no_contents_are_an_error(contents):
    assert Holder.parse(contents) is None


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=255))
def test_a_changed_byte_names_another_holder_or_none(place, byte):
    contents = bytearray(Holder.this().contents())
    contents[place % len(contents)] = byte
    holder = Holder.parse(bytes(contents))
    if holder is not None:
        assert str(holder).isprintable()
        assert holder.dead(Holder.this()) in (True, False)


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_what_is_no_file_is_an_error_and_left_alone(ask, path, kind):
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(path.with_name("elsewhere"))
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    before = path.lstat()
    error = caught_by(ask().attempt)
    assert (error.code, str(path) in error.message) == ("not-writable", True)
    assert "removes it" in error.hint
    assert path.lstat() == before


def test_its_holder_touches_it(ask, path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    taken = ask().attempt()
    for _ in range(2):
        os.utime(path, ns=(0, 0))
        while path.stat().st_mtime_ns == 0:
            time.sleep(0.01)
    taken.release()


def test_who_was_succeeded_neither_touches_nor_removes_the_new_lease(
    ask, left_by, path, monkeypatch
):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.001)
    taken = ask().attempt()
    left_by(ELSEWHERE)
    contents = path.read_bytes()
    os.utime(path, ns=(0, 0))
    time.sleep(0.05)
    taken.release()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (contents, 0)


@pytest.mark.parametrize("gone", ["lease", "cache"])
def test_giving_up_what_is_gone_is_no_error(ask, path, tmp_path, gone):
    taken = ask().attempt()
    path.unlink()
    if gone == "cache":
        path.parent.rmdir()
        (tmp_path / "tmp").rmdir()
    taken.release()
    assert not path.exists()


DEAD = dataclasses.replace(Holder.this(), pid=999_999_999)


def test_who_is_removing_a_dead_holders_lease_is_not_disturbed(ask, left_by, clock, path):
    left_by(DEAD)
    request = ask()
    with open_to_lock(path) as other:
        assert try_lock(other.fileno(), fcntl.LOCK_EX)
        assert request.attempt() is None
        clock.now += 2 * STALE_SECONDS - 1
        assert request.attempt() is None
        clock.now += 1
        request.attempt().release()  # the other was stopped


def test_a_lease_that_was_replaced_since_it_was_looked_at_stays(ask, left_by, path, monkeypatch):
    left_by(DEAD)
    request = ask()

    def replaced_first(fd, kind):
        path.unlink()
        left_by(ELSEWHERE)
        monkeypatch.undo()
        return try_lock(fd, kind)

    monkeypatch.setattr(lease, "try_lock", replaced_first)
    assert request.attempt() is None
    assert Holder.parse(path.read_bytes()) == ELSEWHERE
    assert request.holder == "process 7 on elsewhere"


def test_one_of_many_threads_succeeds_a_dead_holder(ask, left_by):
    def succeed():
        request = ask()
        start.wait()
        return next((taken for _ in range(4) if (taken := request.attempt())), None)

    with ThreadPoolExecutor(6) as pool:
        start = threading.Barrier(6)
        for _ in range(100):
            left_by(DEAD)
            [taken] = filter(None, [f.result() for f in [pool.submit(succeed) for _ in range(6)]])
            taken.release()


TAKERS = """
import dataclasses, sys
from pathlib import Path
from vllmc.core.cache.lease import Holder
from vllmc.core.cache.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
for name in sys.stdin:
    taken = store.request(name.strip()).attempt()
    print(taken is not None, flush=True)
"""


def test_one_of_three_processes_succeeds_a_dead_holder(store, start):
    takers = [start(TAKERS, store.root) for _ in range(3)]
    for taker in takers:
        assert taker.stdout.readline() == "ready\n"
    for index in range(50):
        path = store.layout.lock(str(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DEAD.contents())
        for taker in takers:
            taker.stdin.write(f"{index}\n")
            taker.stdin.flush()
        answers = [taker.stdout.readline() for taker in takers]
        assert sorted(answers) == ["False\n", "False\n", "True\n"]


FORKED = """
import os, sys
from pathlib import Path
from vllmc.core.cache.store import Store
store = Store(Path(sys.argv[1]))
try:
    with store.lock("x", print):
        if (child := os.fork()) == 0:
            sys.exit()
        os.waitpid(child, 0)
        print(store.layout.lock("x").exists())
except SystemExit:
    os._exit(0)
print(store.layout.lock("x").exists())
"""


def test_a_fork_does_not_release_what_its_parent_holds(store, start):
    out, _ = start(FORKED, store.root).communicate()
    assert out.split() == ["True", "False"]


@pytest.fixture
def no_links(monkeypatch):
    """A file system without hard links."""

    def link(source, target, **_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


def test_a_file_system_without_hard_links_has_leases_too(no_links, ask, path, tmp_path):
    with held(ask(), pytest.fail, None):
        assert Holder.parse(path.read_bytes()) == Holder.this()
        assert ask().attempt() is None
    assert not path.exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_answer_that_was_lost_on_the_way_is_no_other_holder(ask, path, monkeypatch):
    """A client of NFS that asks again is told that the link is there: its own."""
    link = os.link

    def lost(source, target, **how):
        link(source, target, **how)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", lost)
    with held(ask(), pytest.fail, None):
        assert Holder.parse(path.read_bytes()) == Holder.this()
