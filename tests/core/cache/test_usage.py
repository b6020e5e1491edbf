from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.cache.files import open_to_lock, try_lock
from vllmc.core.cache.usage import (
    FOLD_AT,
    Counts,
    Hold,
    claimed,
    last_use,
    note,
    read_counts,
)

HIT = Counts(hits=3, seconds_saved=1.25)
MISS = Counts(misses=4, dups=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "used" / ("ab" * 32)


def noted(path: Path, counts: Counts) -> Hold:
    hold = note(path, counts)
    assert hold is not None
    return hold


def is_free(path: Path) -> bool:
    with claimed(path) as free:
        return free


def test_the_counts_of_all_uses_are_added_up(path):
    for counts in (MISS, HIT, HIT):
        noted(path, counts).release()
    assert read_counts(path) == Counts(hits=6, misses=4, dups=1, seconds_saved=2.5)


def test_the_last_use_is_when_the_file_was_last_written(path):
    assert last_use(path) is None
    noted(path, MISS).release()
    os.utime(path, (1000.0, 1000.0))
    assert last_use(path) == 1000.0
    noted(path, HIT).release()
    assert last_use(path) == path.stat().st_mtime > 1000.0


def test_a_file_stays_small_and_keeps_its_sum_and_its_inode(path):
    with_hold = noted(path, HIT)
    inode = path.stat().st_ino
    largest = 0
    for _ in range(2500):
        noted(path, HIT).release()
        largest = max(largest, path.stat().st_size)
    assert largest < FOLD_AT + 100
    assert path.stat().st_size < FOLD_AT // 2, "it was folded at least once"
    assert read_counts(path) == Counts(hits=7503, seconds_saved=3126.25)
    assert path.stat().st_ino == inode
    assert not is_free(path), "folding leaves the hold"
    with_hold.release()


@pytest.mark.parametrize(
    "garbage", [b"", b"\0" * 50, b"1 2 3 4.000\n", b"1 2 3 4.000 00000000\n", b"9" * 300_000]
)
def test_damage_loses_counts_and_raises_nothing(path, garbage):
    noted(path, HIT).release()
    path.write_bytes(garbage)
    assert read_counts(path) == Counts()
    noted(path, MISS).release()
    noted(path, MISS).release()
    assert read_counts(path).misses in (4, 8), "what follows a torn line may go with it"
    assert path.stat().st_size < FOLD_AT


@given(st.integers(0, 200), st.integers(0, 255), st.integers(0, 200))
def test_no_damage_adds_to_the_counts(place, value, length):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "used"
        for counts in (HIT, MISS, HIT):
            noted(path, counts).release()
        data = bytearray(path.read_bytes())
        data[place % len(data)] = value
        path.write_bytes(bytes(data)[:length])
        found = read_counts(path)
        assert found.hits in (0, 3, 6)
        assert found.misses in (0, 4)
        assert found.seconds_saved == found.hits / 3 * 1.25


def test_an_unfinished_line_costs_one_more_at_most(path):
    noted(path, HIT).release()
    with path.open("ab") as file:
        file.write(b"3 0 0 1.2")
    for _ in range(3):
        noted(path, MISS).release()
    assert read_counts(path) == HIT + MISS + MISS


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_what_is_no_plain_file_is_left_alone(path, tmp_path, kind):
    path.parent.mkdir()
    aside = tmp_path / "aside"
    aside.write_bytes(b"mine")
    if kind == "link":
        path.symlink_to(aside)
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert note(path, HIT) is None
    assert read_counts(path) == Counts()
    assert is_free(path)
    assert aside.read_bytes() == b"mine"


def test_what_has_another_name_too_is_held_and_not_written(path, tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"of this user\n" * 20_000)
    path.parent.mkdir(exist_ok=True)
    path.hardlink_to(precious)
    assert note(path, Counts(hits=1)) is not None
    assert precious.read_bytes() == b"of this user\n" * 20_000


def test_nothing_is_made_where_there_is_no_cache(tmp_path):
    assert note(tmp_path / "v1" / "used" / "key", HIT) is None
    assert list(tmp_path.iterdir()) == []


def test_a_hold_ends_when_it_is_released_or_forgotten(path):
    first, second = noted(path, HIT), noted(path, HIT)
    first.release()
    first.release()
    assert not is_free(path)
    del second
    gc.collect()
    assert is_free(path)


HOLD = """
import sys
from pathlib import Path
from vllmc.core.cache.usage import Counts, note
hold = note(Path(sys.argv[1]), Counts())
print(hold is not None, flush=True)
sys.stdin.read()
"""


def test_the_kernel_drops_the_hold_of_a_process_that_is_killed(path, start):
    path.parent.mkdir()
    process = start(HOLD, path)
    assert process.stdout.readline() == "True\n"
    assert not is_free(path)
    process.kill()
    process.wait()
    assert is_free(path)


READ_ONLY = """
import os, sys
from pathlib import Path
from vllmc.core.cache.usage import Counts, note
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
hold = note(Path(sys.argv[1]), Counts(hits=1))
print(hold is not None, flush=True)
sys.stdin.read()
"""


def test_a_file_that_cannot_be_written_is_held_all_the_same(start):
    # Not tmp_path: only its owner may enter it, and root becomes another user here.
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "used"
        noted(path, HIT).release()
        Path(root).chmod(0o555)
        path.chmod(0o444)
        before = path.stat()
        process = start(READ_ONLY, path)
        assert process.stdout.readline() == "True\n"
        path.chmod(0o644)
        assert not is_free(path)
        assert read_counts(path) == HIT
        assert path.stat().st_mtime == before.st_mtime


FULL = """
import resource, sys
from pathlib import Path
from vllmc.core.cache.usage import Counts, note
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, path.stat().st_size))
print(note(path, Counts(hits=1)) is not None)
"""


def test_on_a_full_disk_the_time_is_noted_and_nothing_raised(path, start):
    noted(path, HIT).release()
    os.utime(path, (1000.0, 1000.0))
    out, _ = start(FULL, path).communicate()
    assert out == "True\n"
    assert read_counts(path) == HIT
    assert path.stat().st_mtime > 1000.0


WRITE = """
import sys
from pathlib import Path
from vllmc.core.cache.usage import Counts, note
for _ in range(int(sys.argv[2])):
    note(Path(sys.argv[1]), Counts(hits=1, seconds_saved=0.5)).release()
"""


def test_many_writers_lose_nothing_while_no_line_is_folded(path, start):
    path.parent.mkdir()
    each = FOLD_AT // 3 // len("1 0 0 0.500 01234567\n")
    for process in [start(WRITE, path, each) for _ in range(3)]:
        assert process.wait() == 0
    assert read_counts(path) == Counts(hits=3 * each, seconds_saved=1.5 * each)


def test_many_writers_never_add_a_line_up_twice(path, start):
    path.parent.mkdir()
    for process in [start(WRITE, path, 2500) for _ in range(3)]:
        assert process.wait() == 0
    found = read_counts(path)
    assert 0 < found.hits <= 7500
    assert found.seconds_saved == found.hits / 2
    assert path.stat().st_size < FOLD_AT + 1000


def test_a_use_that_meets_a_removal_is_noted_in_a_new_file(path):
    noted(path, HIT).release()
    found: list[Hold | None] = []
    with claimed(path) as free:
        assert free
        thread = threading.Thread(target=lambda: found.append(note(path, MISS)))
        thread.start()
        path.unlink()
    thread.join()
    assert found[0] is not None
    assert read_counts(path) == MISS
    assert not is_free(path)


OVERTAKEN = """
import sys
from pathlib import Path
from vllmc.core.cache.usage import Counts, note, read_counts
path, moments = Path(sys.argv[1]), []
def hook(event, arguments):
    if event == "fcntl.flock" and not moments:
        moments.append(event)
        path.unlink()
sys.addaudithook(hook)
hold = note(path, Counts(hits=1))
print(hold is not None, read_counts(path).hits, moments)
"""


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(path, start):
    noted(path, HIT).release()
    out, _ = start(OVERTAKEN, path).communicate()
    assert out == "True 1 ['fcntl.flock']\n"


def test_a_use_waits_for_a_removal_no_longer_than_a_moment(path):
    noted(path, HIT).release()
    with claimed(path) as free:
        assert free
        assert note(path, MISS) is None
    assert read_counts(path) == HIT


def test_another_prunes_look_is_not_taken_for_a_hold(path, monkeypatch):
    noted(path, HIT).release()
    other = open_to_lock(path)
    assert try_lock(other.fileno(), fcntl.LOCK_EX)
    monkeypatch.setattr(time, "sleep", lambda _: other.close())
    assert is_free(path)


def test_noting_imports_no_torch():
    script = "import sys, vllmc.core.cache.usage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
