from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.record import FormatTooNew, decode, encode
from vllmc.core.cache.store import CorruptArtifact, CorruptRecordError, MissingArtifact, Store
from vllmc.core.cache.usage import Counts
from vllmc.core.errors import UnsafeCacheError, UsageError, VllmcError

ABSENT = "0" * 64


def read_everything(store: Store) -> tuple[object, ...]:
    return (
        store.unit(ABSENT),
        store.programs(ABSENT),
        store.find_code(ABSENT),
        *store.readable_units(),
        *store.readable_programs(),
        store.entries(),
        store.stats().artifacts,
        store.verify(),
        store.plan_repair(()).removals,
    )


def caught_by(call: Callable[[], object]) -> VllmcError:
    with pytest.raises(VllmcError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("data", [b"", b"\0", os.urandom(1_000_000)], ids=len)
def test_an_artifact_is_read_back_under_its_digest(store, data):
    digest = store.put_artifact(data)
    assert digest == sha256_hex(data)
    assert store.read_artifact(digest) == data
    assert store.put_artifact(data) == digest


def test_records_are_read_back_under_their_keys(store, warm):
    warmed = warm(b"one", b"two")
    assert [store.unit(unit.key) for unit in warmed.units] == list(warmed.units)
    assert store.programs(warmed.program.key) == (warmed.program,)
    assert sorted(u.key for u in store.readable_units()) == sorted(u.key for u in warmed.units)
    assert list(store.readable_programs()) == [warmed.program]
    assert store.record(warmed.program.key) == (warmed.program,)
    assert store.record(warmed.units[0].key) == warmed.units[0]


def test_what_is_there_and_intact_is_not_written_again(store, warm, files):
    warmed = warm(b"one", b"two")
    before = {path: path.stat().st_ino for path in store.root.rglob("*")}
    store.put_artifact(b"one")
    store.put_unit(warmed.units[0])
    store.put_program(warmed.program)
    assert {path: path.stat().st_ino for path in store.root.rglob("*")} == before


def test_two_versions_of_the_sources_share_a_key_newest_first(store, make_program):
    old = make_program(source="a" * 32, created=1.0)
    new = make_program(source="b" * 32, created=2.0)
    for record in (new, old):
        store.put_program(record)
    assert old.key == new.key
    assert store.programs(old.key) == (new, old)


def test_a_record_compiled_again_replaces_the_earlier_one(store, warm, make_unit):
    [unit] = warm(b"one").units
    again = dataclasses.replace(unit, artifact=store.put_artifact(b"one, other bytes"), seconds=9.0)
    store.put_unit(again)
    assert store.unit(unit.key) == again


def test_a_flipped_byte_anywhere_in_an_artifact_is_detected(store):
    data = bytes(range(64))
    digest = store.put_artifact(data)
    path = store.layout.blob(digest)
    for offset in range(len(data)):
        broken = bytearray(data)
        broken[offset] ^= 0x20
        path.write_bytes(broken)
        error = caught_by(lambda: store.read_artifact(digest))
        assert isinstance(error, CorruptArtifact)
        assert error.context["expected"] == digest
        assert error.context["found"] == sha256_hex(bytes(broken))


@pytest.mark.parametrize("broken", [b"", b"artifac", b"artifact, and more"])
def test_a_truncated_or_longer_artifact_is_corrupt_until_it_is_put_again(store, broken):
    digest = store.put_artifact(b"artifact")
    store.layout.blob(digest).write_bytes(broken)
    error = caught_by(lambda: store.read_artifact(digest))
    assert isinstance(error, UnsafeCacheError)
    assert (error.code, error.exit_code) == ("corrupt-artifact", 4)
    assert str(store.layout.blob(digest)) in error.message
    assert error.hint == "vllmc cache verify --repair"
    store.put_artifact(b"artifact")
    assert store.read_artifact(digest) == b"artifact"


def test_swapped_artifacts_are_corrupt(store):
    one, two = store.layout.blob(store.put_artifact(b"one")), store.put_artifact(b"two")
    one.write_bytes(store.read_artifact(two))
    assert caught_by(lambda: store.read_artifact(sha256_hex(b"one"))).code == "corrupt-artifact"


def test_a_missing_artifact_is_not_called_corrupt(store):
    error = caught_by(lambda: store.read_artifact(ABSENT))
    assert isinstance(error, MissingArtifact)
    assert (error.code, error.exit_code) == ("missing-artifact", 1)


def test_a_link_to_an_intact_artifact_is_refused_and_replaced(store, tmp_path):
    digest = store.put_artifact(b"artifact")
    path = store.layout.blob(digest)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    error = caught_by(lambda: store.read_artifact(digest))
    assert isinstance(error, CorruptArtifact)
    assert "symbolic link" in error.message
    store.put_artifact(b"artifact")
    assert store.read_artifact(digest) == b"artifact"
    assert not path.is_symlink()


def test_a_corrupt_record_is_refused_by_name_and_skipped_by_searches(store, warm):
    warmed = warm(b"one", b"two")
    path = store.layout.program(warmed.program.key, warmed.program.id)
    path.write_bytes(path.read_bytes().replace(b"tiny", b"tidy"))
    for read in (store.programs, store.record):
        error = caught_by(lambda read=read: read(warmed.program.key))
        assert isinstance(error, CorruptRecordError)
        assert (error.code, error.exit_code) == ("corrupt-record", 4)
        assert str(path) in error.message
    assert list(store.readable_programs()) == []
    assert store.entries() == ()
    assert len(list(store.readable_units())) == 2


def test_a_record_in_the_place_of_another_is_corrupt(store, warm, make_program):
    one, two = warm(b"one", b"two").units
    store.layout.unit(one.key).write_bytes(encode(two))
    assert caught_by(lambda: store.unit(one.key)).code == "corrupt-record"
    assert list(store.readable_units()) == [two]
    program, other = make_program(source="a" * 32), make_program(source="b" * 32)
    store.put_program(program)
    store.layout.program(program.key, program.id).write_bytes(encode(other))
    assert caught_by(lambda: store.programs(program.key)).code == "corrupt-record"
    store.layout.unit(one.key).write_bytes(encode(program))
    assert caught_by(lambda: store.unit(one.key)).code == "corrupt-record"


def test_a_link_in_place_of_a_record_is_corrupt(store, warm, tmp_path):
    [unit] = warm(b"one").units
    path = store.layout.unit(unit.key)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert "symbolic link" in caught_by(lambda: store.unit(unit.key)).message


def test_a_discarded_file_is_a_miss_and_nothing_else_is_touched(store, warm, files):
    warmed = warm(b"one", b"two")
    path = store.layout.unit(warmed.units[0].key)
    path.write_bytes(b"{}")
    error = caught_by(lambda: store.unit(warmed.units[0].key))
    before = files(store.root)
    store.discard(error)
    del before[path.relative_to(store.root).as_posix()]
    assert files(store.root) == before
    assert store.unit(warmed.units[0].key) is None


def test_a_record_of_a_later_vllmc_gets_a_clear_error(store, warm):
    [unit] = warm(b"one").units
    path = store.layout.unit(unit.key)
    match = re.fullmatch(
        rb'(.*"version":)1(,"checksum":")(\w{64})(","body":)(.*)\}\n', encode(unit)
    )
    checksum = sha256_hex(b"vllmc.unit 2\n" + match[5]).encode()
    path.write_bytes(match[1] + b"2" + match[2] + checksum + match[4] + match[5] + b"}\n")
    error = caught_by(lambda: store.unit(unit.key))
    assert isinstance(error, FormatTooNew)
    assert str(path) in error.message
    assert list(store.readable_units()) == []


def test_identical_code_is_found_while_its_artifact_is_there(store, warm):
    [unit] = warm(b"one").units
    assert store.find_code(unit.code) == unit.artifact
    assert store.find_code(ABSENT) is None
    store.layout.blob(unit.artifact).unlink()
    assert store.find_code(unit.code) is None


@pytest.mark.parametrize("damage", ["swapped", "truncated", "link"])
def test_a_damaged_note_about_code_is_no_note(store, warm, tmp_path, damage):
    one, two = warm(b"one", b"two").units
    path = store.layout.code(one.code)
    if damage == "swapped":
        path.write_bytes(store.layout.code(two.code).read_bytes())
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    assert store.find_code(one.code) is None


def test_reading_an_absent_cache_finds_nothing_and_creates_nothing(tmp_path):
    store = Store(tmp_path / "not" / "there")
    assert read_everything(store) == (None, (), None, (), 0, (), ())
    assert caught_by(lambda: store.read_artifact(ABSENT)).code == "missing-artifact"
    assert caught_by(lambda: store.record(ABSENT)).code == "unknown-key"
    assert caught_by(lambda: store.resolve_prefix(ABSENT)).code == "unknown-key"
    assert store.note_use(ABSENT, Counts()) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_cache_directory_that_is_a_file_gets_a_clear_error(tmp_path, root):
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / root)
    for read in (
        lambda: store.unit(ABSENT),
        lambda: store.read_artifact(ABSENT),
        lambda: store.find_code(ABSENT),
        store.entries,
        store.verify,
    ):
        assert caught_by(read).code == "bad-cache-dir"
    assert caught_by(lambda: store.put_artifact(b"data")).code == "not-writable"
    assert caught_by(store.lock("x", pytest.fail).__enter__).code == "not-writable"
    assert store.note_use(ABSENT, Counts()) is None


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from typing import Any
from vllmc.core.cache.store import Store
from vllmc.core.cache.usage import Counts
from vllmc.core.errors import VllmcError
store, key = Store(Path(sys.argv[1])), sys.argv[2]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def attempt(call):
    try:
        return call()
    except VllmcError as error:
        return error.code
def lock():
    with store.lock("x", print):
        pass
print(attempt(lambda: store.unit(key)), attempt(lambda: store.put_artifact(b"new")), attempt(lock))
print(attempt(lambda: [problem.kind for problem in store.verify()]))
print(store.note_use(key, Counts()))
"""


def test_a_cache_without_permissions_gives_clear_errors(make_unit, start):
    unit = make_unit(b"one")
    # Not tmp_path: only its owner may enter it, and root becomes another user here.
    with tempfile.TemporaryDirectory() as root:
        store = Store(Path(root))
        store.put_artifact(b"one")
        store.put_unit(unit)
        for path in (store.root, *store.root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        store.layout.unit(unit.key).chmod(0)
        out, _ = start(UNPRIVILEGED, root, unit.key).communicate()
    assert out.splitlines() == [
        "not-readable not-writable not-writable",
        "['not-readable']",
        "None",
    ]


FULL_DISK = """
import resource, sys
from pathlib import Path
from typing import Any
from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = Store(Path(sys.argv[1]))
store.put_artifact(b"it fits")
try:
    store.put_artifact(bytes(100_000))
except VllmcError as error:
    print(error.code, "--cache-dir" in error.hint)
"""


def test_a_full_disk_is_named_and_leaves_no_part_of_a_file(store, start, files):
    out, _ = start(FULL_DISK, store.root).communicate()
    assert out == "disk-full True\n"
    assert list(files(store.root).values()) == [b"it fits"]
    assert store.verify() == ()


def test_a_use_is_noted(store, warm):
    program = warm(b"one").program
    key, record = program.key, store.layout.program(program.key, program.id)
    os.utime(record, (2000.0, 2000.0))
    [before] = store.entries()
    assert before.last_used == 2000.0
    store.note_use(key, Counts())
    noted = store.layout.used(key).stat().st_mtime
    assert [entry.last_used for entry in store.entries()] == [noted]
    assert noted > before.last_used


def test_a_prefix_of_eight_digits_finds_a_program_or_a_unit(store, warm):
    warmed = warm(b"one")
    for key in (warmed.program.key, warmed.units[0].key):
        assert store.resolve_prefix(key[:8]) == key
        assert store.resolve_prefix(key[:20].upper()) == key
        assert store.resolve_prefix(key) == key


def test_an_ambiguous_prefix_lists_the_candidates(store, make_unit):
    unit = make_unit(b"one")
    keys = ["ab" * 6 + "0" * 52, "ab" * 6 + "1" * 52]
    for key in keys:
        store.put_unit(dataclasses.replace(unit, key=key))
    error = caught_by(lambda: store.resolve_prefix("abababab"))
    assert error.code == "ambiguous-key"
    assert error.context["candidates"] == keys
    assert store.resolve_prefix("ab" * 6 + "1") == keys[1]
    assert keys[0][:13] in error.hint


def test_an_unknown_prefix_and_one_that_is_no_prefix(store, warm):
    key = warm(b"one").program.key
    absent = ("0" if key[7] != "0" else "1").join((key[:7], ""))
    assert caught_by(lambda: store.resolve_prefix(absent)).code == "unknown-key"
    for text in (key[:7], key + "0", "tiny-llama", "", "../../../etc"):
        error = caught_by(lambda text=text: store.resolve_prefix(text))
        assert isinstance(error, UsageError)


def test_a_key_whose_records_were_removed_is_unknown(store, warm):
    program = warm(b"one").program
    store.layout.program(program.key, program.id).unlink()
    assert caught_by(lambda: store.resolve_prefix(program.key[:8])).code == "unknown-key"
    assert caught_by(lambda: store.record(program.key)).code == "unknown-key"


def test_records_on_disk_are_what_encode_wrote(store, warm):
    program = warm(b"one").program
    data = store.layout.program(program.key, program.id).read_bytes()
    assert data == encode(program)
    assert decode(data) == program


def test_the_store_and_its_explanations_import_no_torch():
    script = (
        "import sys, vllmc.core.cache.store, vllmc.core.cache.explain;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


HIT = """
import json, sys
from pathlib import Path
from typing import Any
from vllmc.core.cache.store import Store

root, key = sys.argv[1:]
seen = []

def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(root):
        seen.append((event, str(Path(arguments[0]).relative_to(root))))

sys.addaudithook(watch)
store = Store(Path(root))
[record] = store.programs(key)
for unit in record.units:
    store.read_artifact(unit.artifact)
print(json.dumps(seen))
"""


def test_a_hit_opens_each_file_once_and_lists_no_directory_but_its_own(
    store: Store, warm: Callable[..., Any], start: Callable[..., subprocess.Popen[str]]
) -> None:
    wanted = warm(b"one", b"two", model="wanted")
    for number in range(20):
        warm(b"other %d" % number, b"two", model=f"other {number}")
    told, _ = start(HIT, store.root, wanted.program.key).communicate()
    paths = store.layout
    record = paths.program(wanted.program.key, wanted.program.id)
    opened = [record, *(paths.blob(unit.artifact) for unit in wanted.units)]
    assert json.loads(told) == [
        ["os.scandir", str(record.parent.relative_to(store.root))],
        *(["open", str(path.relative_to(store.root))] for path in opened),
    ]
