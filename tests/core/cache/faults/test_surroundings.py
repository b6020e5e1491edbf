"""Disks that are full, clocks that run backwards, directories that may not be entered or written
to, another version of vllmc on the same cache.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import faulty
import pytest

from vllmc.core.cache.key import Factor, key_of
from vllmc.core.cache.store import Store

SUPPORT = Path(faulty.__file__).parent

FULL = """
import os, sys
from pathlib import Path
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError
store, stored = Store(Path(sys.argv[1])), []
def data(index):
    return index.to_bytes(4, "big") * (1 + index * 997 % 3000)
def put(index):
    with store.lock(str(index), print):
        stored.append((store.put_artifact(data(index)), index))
try:
    for index in range(10_000):
        put(index)
except VllmcError as error:
    print(error.code)
for index in range(20):
    try:
        put(20_000 + index)
    except VllmcError as error:
        assert error.code == "disk-full", error
assert all(store.read_artifact(digest) == data(index) for digest, index in stored)
assert store.verify() == ()
assert not [*store.layout.temporary.iterdir()], "drafts take room"
for digest, _ in stored[:5]:
    store.layout.blob(digest).unlink()
del stored[:5]
put(index)
assert all(store.read_artifact(digest) == data(index) for digest, index in stored)
print(len(stored))
"""


@pytest.mark.parametrize("limit", ["size=400k", "nr_inodes=200"])
def test_a_disk_without_room_keeps_what_is_on_it(tmp_path, limit, counted):
    mount = f"mount -t tmpfs -o {limit} none {tmp_path}"
    space = ["unshare", "--mount", "sh", "-c"]
    try:
        subprocess.run([*space, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        [*space, f'{mount} && exec "$@"', "sh", sys.executable, "-c", FULL, tmp_path / "cache"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, stored = done.stdout.split()
    assert code == "disk-full"
    assert int(stored) > 10
    counted(f"artifacts kept on a disk that was filled ({limit})", int(stored))


CLOCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import faulty
from vllmc.core.cache.record import decode
from vllmc.core.cache.store import Store
clock = [4e9]
def backwards():
    clock[0] -= 100_000.0
    return clock[0]
time.time = backwards
root, *units, program = (Path(p) for p in sys.argv[2:])
units = [decode(p.read_bytes()) for p in units]
program = decode(program.read_bytes())
for _ in range(3):
    faulty.publish(Store(root), units, program)
    assert Store(root).programs(program.key) == (program,)
print(len(Store(root).entries()), Store(root).verify())
"""


def test_a_clock_that_runs_backwards_days_at_a_time(publish, tmp_path):
    publication = publish()
    root = tmp_path / "cache"
    draft = Store(root).layout.temporary / "1.of-another-process"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half a fi")
    done = subprocess.run(
        [sys.executable, "-c", CLOCK, SUPPORT, root, *publication.paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("1 ()\n", "")
    assert draft.exists(), "what another process writes now is no leftover of last year"
    publication.into(Store(root))


@pytest.mark.parametrize("moment", [0, 10**18, 4 * 10**18], ids=["1970", "2001", "2096"])
def test_files_of_the_past_and_the_future(publish, tmp_path, files, moment):
    publication = publish()
    store = Store(tmp_path / "cache")
    publication.into(store)
    for found in list(store.layout.walk()):
        os.utime(found.path, ns=(moment, moment))
    before = files(store.root)
    publication.into(store)
    assert files(store.root) == before
    assert store.programs(publication.program.key) == (publication.program,)
    assert store.verify() == ()
    assert [entry.key for entry in store.entries()] == [publication.program.key]


DENIED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import faulty
from vllmc.core.cache.record import decode
from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError
root, *units, program = (Path(p) for p in sys.argv[2:])
units = [decode(p.read_bytes()) for p in units]
program = decode(program.read_bytes())
if os.geteuid() == 0:
    for path in (root, *root.rglob("*")):
        os.chown(path, 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
store = Store(root)
faulty.publish(store, units, program)
known = ("not-readable", "not-writable", "bad-cache-dir")
tried, refused = 0, set()
told = [
    *(lambda unit=unit: store.unit(unit.key) for unit in units),
    *(lambda unit=unit: store.read_artifact(unit.artifact) for unit in units),
    *(lambda unit=unit: store.find_code(unit.code) for unit in units),
    lambda: store.programs(program.key), store.verify,
]
asked = [
    *told, store.entries, store.stats,
    lambda: store.resolve_prefix(program.key[:8]),
    lambda: faulty.publish(store, units, program), lambda: store.put_artifact(b"more"),
]
right = [ask() for ask in told]
for path in (root, *sorted(root.rglob("*"))):
    mode = path.stat().st_mode
    for denied in (0, 0o400, 0o500, 0o100):
        path.chmod(denied)
        for ask in asked:
            tried += 1
            try:
                ask()
            except VllmcError as error:
                assert error.code in known, error
                refused.add(error.code)
        path.chmod(mode)
assert [ask() for ask in told] == right
print(tried, *sorted(refused))
"""


def test_files_and_directories_without_permission(publish, counted):
    publication = publish()
    # Not tmp_path: root becomes another user here, who may not enter it.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        root = Path(place) / "cache"
        publication.into(Store(root))
        done = subprocess.run(
            [sys.executable, "-c", DENIED, SUPPORT, root, *publication.paths],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    tried, *refused = done.stdout.split()
    assert refused == ["not-readable", "not-writable"]
    counted("a call with a file or directory whose mode forbids it", int(tried))


def of_version(publication, version):
    """What another version of vllmc publishes for the same graphs: its code is in every key."""
    code = Factor(group="code", name="vllmc", value=version, origin="probe")
    units = []
    for unit in publication.units:
        factors = (*unit.factors, code)
        units.append(dataclasses.replace(unit, key=key_of(factors), factors=factors))
    factors = (*publication.program.factors, code)
    program = dataclasses.replace(
        publication.program,
        key=key_of(factors),
        factors=factors,
        units=tuple(
            dataclasses.replace(place, key=unit.key)
            for place, unit in zip(publication.program.units, units, strict=True)
        ),
    )
    return dataclasses.replace(publication, units=tuple(units), program=program)


def test_two_versions_of_vllmc_share_artifacts_and_nothing_else(publish, tmp_path):
    store = Store(tmp_path / "cache")
    versions = [of_version(publish(), version) for version in ("1.0", "1.1")]
    for publication in versions:
        publication.into(store)
    assert store.stats().artifacts == 2
    for publication in versions:
        assert store.programs(publication.program.key) == (publication.program,)
        assert [store.unit(unit.key) for unit in publication.units] == list(publication.units)
    old, new = versions
    record = store.layout.unit(old.units[0].key)
    record.write_bytes(record.read_bytes()[:-1])
    store.plan_repair(store.verify()).execute()
    assert store.unit(old.units[0].key) is None
    assert [store.unit(unit.key) for unit in new.units] == list(new.units)
