from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllmc.core.cache.files import SWEEP_AFTER_SECONDS
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.layout import Layout
from vllmc.core.cache.record import UnitRecord
from vllmc.core.cache.signing import generate, public_text
from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Trust
from vllmc.core.cache.trust_store import add_key
from vllmc.core.diagnose.doctor_facts import Layer, Mount
from vllmc.core.diagnose.doctor_places import Named, look_at, look_into_layer, mount_of, read_mounts

NOBODY = 65534

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - overlay overlay rw,lowerdir=/a:/b,upperdir=/c
30 27 0:25 / /dev/shm rw,nosuid,noexec - tmpfs shm rw,size=65536k
31 27 8:1 /var/lib/docker/volumes/cache/_data /my\040data ro,relatime - ext4 /dev/sda1 rw
32 27 8:1 /first /mnt rw - ext4 /dev/sda1 rw
33 27 8:1 /second /mnt rw - xfs /dev/sda2 rw
cut off in the mid
34 27 8:1 / /odd rw -
"""


@pytest.fixture
def mounts(tmp_path: Path) -> tuple[Mount, ...]:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTINFO)
    return read_mounts(file)


@pytest.fixture
def in_the_open() -> Iterator[Path]:
    """A directory that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    if (path / "v1").exists():
        (path / "v1").chmod(0o755)
    shutil.rmtree(path)


@pytest.fixture
def not_root() -> Iterator[None]:
    """A user who is not let into everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield
    if root:
        os.seteuid(0)


def test_mounts_are_read_with_their_roots_kinds_and_all_options(mounts: tuple[Mount, ...]) -> None:
    assert [mount.point for mount in mounts] == [
        *("/proc", "/", "/dev/shm", "/my data", "/mnt", "/mnt"),
    ]
    volume = mounts[3]
    assert (volume.root, volume.kind) == ("/var/lib/docker/volumes/cache/_data", "ext4")
    assert {"ro", "relatime"} <= set(volume.options)


def test_a_path_lies_on_the_deepest_mount_and_there_on_the_latest(
    mounts: tuple[Mount, ...],
) -> None:
    def kind(path: str) -> str:
        found = mount_of(path, mounts)
        assert found is not None
        return found.kind

    assert kind("/home/ada") == "overlay"
    assert kind("/dev/shm/cache") == "tmpfs"
    assert kind("/dev/shmem") == "overlay"
    assert kind("/my data/vllmc") == "ext4"
    assert kind("/mnt/x") == "xfs"


def test_without_proc_nothing_is_known_of_mounts(tmp_path: Path) -> None:
    assert read_mounts(tmp_path / "absent") == ()
    assert mount_of("/data", ()) is None


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs /proc")
def test_this_machines_own_mounts_are_understood() -> None:
    root = mount_of("/", read_mounts())
    assert root is not None
    assert root.point == "/"
    shm = mount_of("/dev/shm", read_mounts())
    assert shm is None or shm.point != "/dev/shm" or shm.kind == "tmpfs"


def test_a_directory_has_its_owner_mode_and_room(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    cache.chmod(0o2770)
    found = look_at(cache, read_mounts())
    assert (found.state, found.reason, found.existing) == ("directory", "", str(cache))
    assert (found.owner, found.mode) == (os.geteuid(), 0o2770)
    assert found.readable
    assert found.writable
    assert found.space is not None
    assert 0 <= found.space.free_bytes < found.space.total_bytes


def test_a_missing_directory_is_judged_by_the_deepest_that_exists(tmp_path: Path) -> None:
    found = look_at(tmp_path / "a" / "b" / "c", read_mounts())
    assert (found.state, found.existing) == ("missing", str(tmp_path))
    assert (found.owner, found.mode, found.readable) == (None, None, False)
    assert found.writable
    assert found.space is not None


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    os.mkfifo(tmp_path / "pipe")

    def state(name: str) -> tuple[str, str]:
        found = look_at(tmp_path / name, ())
        assert found.existing == str(tmp_path)
        return found.state, found.reason

    assert state("file") == ("not-a-directory", "a file")
    assert state("file/cache") == ("not-a-directory", "below a file")
    assert state("nowhere") == ("not-a-directory", "a link to what is not there")
    assert state("pipe") == ("not-a-directory", "no directory")
    assert state("round")[0] == "unreachable"
    assert state("x" * 300)[0] == "unreachable"


def test_a_link_is_followed_to_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = look_at(tmp_path / "link", ())
    assert (found.path, found.state) == (str(tmp_path / "link"), "directory")
    assert found.resolved == str((tmp_path / "real").resolve())


def test_permissions_are_those_of_the_user_who_runs_it(
    in_the_open: Path, request: pytest.FixtureRequest
) -> None:
    for name, mode in (("closed", 0o700), ("read-only", 0o555), ("drop", 0o1777), ("dark", 0o711)):
        (in_the_open / name).mkdir()
        (in_the_open / name).chmod(mode)
    if os.geteuid() != 0:
        (in_the_open / "closed").chmod(0o000)
        (in_the_open / "dark").chmod(0o111)
    request.getfixturevalue("not_root")

    def rights(name: str) -> tuple[str, bool, bool]:
        found = look_at(in_the_open / name, ())
        return found.state, found.readable, found.writable

    assert rights("closed") == ("directory", False, False)
    assert rights("read-only") == ("directory", True, False)
    assert rights("drop") == ("directory", True, True)
    assert rights("dark") == ("directory", False, False)
    inside = look_at(in_the_open / "closed" / "cache", ())
    assert (inside.state, inside.existing) == ("unreachable", str(in_the_open / "closed"))
    assert inside.reason


def layer_at(path: Path) -> Layer:
    named = Named(path=path, given="", origin="default")
    keys = path.parent / "no-keys"
    return look_into_layer(named, role="written", mounts=(), trust=Trust(keys=keys))


def store(root: Path, name: str = "a", version: str = "1") -> Path:
    """An empty record of a program, as only this user may write it."""
    record = Layout(root).program(sha256_hex(name), sha256_hex(version))
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("{}")
    record.chmod(0o644)
    return record


def test_programs_are_counted_and_the_newest_is_dated(tmp_path: Path) -> None:
    for index, (name, version) in enumerate([("a", "1"), ("a", "2"), ("b", "1")]):
        os.utime(store(tmp_path, name, version), (1000.0 - index, 1000.0 - index))
    found = layer_at(tmp_path)
    assert (found.programs, found.newest) == (2, 1000.0)
    assert (found.untrusted, found.unreadable) == (0, 0)


def test_records_in_a_directory_that_others_may_write_are_not_trusted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store(cache, "a")
    store(cache, "b")
    assert layer_at(cache).untrusted == 0
    cache.chmod(0o777)
    assert layer_at(cache).untrusted == 2


def test_records_that_a_trusted_key_signed_are_trusted_wherever_they_lie(tmp_path: Path) -> None:
    cache, keys = tmp_path / "cache", tmp_path / "keys"
    pair = generate()
    trust = Trust(keys=keys)
    add_key(trust, public_text(pair.public, "ours"), "ours", "ours.pub")
    unit = UnitRecord(
        key=sha256_hex("unit"),
        artifact=sha256_hex("artifact"),
        format="native",
        code=sha256_hex("code"),
        bytes=1,
        seconds=1.0,
        created=1.0,
        factors=(),
    )
    Store(cache, signing=pair).put_unit(unit)
    cache.chmod(0o777)
    named = Named(path=cache, given="", origin="default")
    found = look_into_layer(named, role="written", mounts=(), trust=trust)
    assert found.untrusted == 0
    assert layer_at(cache).untrusted == 1


def test_files_that_others_may_write_are_not_trusted(tmp_path: Path) -> None:
    store(tmp_path, "a").chmod(0o664)
    store(tmp_path, "b").chmod(0o646)
    store(tmp_path, "c").chmod(0o444)
    assert layer_at(tmp_path).untrusted == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_others_are_not_trusted_and_those_of_root_are(
    in_the_open: Path, request: pytest.FixtureRequest
) -> None:
    store(in_the_open, "root's")
    os.chown(store(in_the_open, "another's"), 12345, -1)
    assert layer_at(in_the_open).untrusted == 1
    request.getfixturevalue("not_root")
    assert layer_at(in_the_open).untrusted == 1


def test_what_is_closed_to_this_user_is_unreadable(
    in_the_open: Path, request: pytest.FixtureRequest
) -> None:
    record = store(in_the_open)
    record.chmod(0o000)
    request.getfixturevalue("not_root")
    found = layer_at(in_the_open)
    assert (found.programs, found.unreadable) == (1, 1)


def test_a_closed_directory_below_is_unreadable(
    in_the_open: Path, request: pytest.FixtureRequest
) -> None:
    store(in_the_open)
    (in_the_open / "v1").chmod(0o000)
    request.getfixturevalue("not_root")
    found = layer_at(in_the_open)
    assert (found.place.readable, found.programs, found.unreadable) == (True, 0, 1)


def test_only_drafts_that_are_surely_nobodys_are_leftovers(tmp_path: Path) -> None:
    temporary = Layout(tmp_path).temporary
    temporary.mkdir(parents=True)
    (temporary / "fresh").write_bytes(b"....")
    (temporary / "stale").write_bytes(b"..")
    old = time.time() - SWEEP_AFTER_SECONDS - 60
    os.utime(temporary / "stale", (old, old))
    found = layer_at(tmp_path)
    assert (found.leftovers, found.leftover_bytes) == (1, 2)


def test_a_cache_that_is_not_there_counts_as_empty(tmp_path: Path) -> None:
    found = layer_at(tmp_path / "absent")
    assert (found.programs, found.newest, found.unreadable, found.leftovers) == (0, None, 0, 0)
    (tmp_path / "v1").write_text("a file")
    assert layer_at(tmp_path).unreadable == 1
