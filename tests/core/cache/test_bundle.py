"""Bundles: the same bytes for the same programs, and nothing but what `write` wrote is read."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.cache import bundle
from vllmc.core.cache.bundle import BadBundle
from vllmc.core.cache.exchange import export, import_bundle, imports_of, read_manifest, select
from vllmc.core.cache.key import canonical_json, sha256_hex
from vllmc.core.cache.record import FormatTooNew
from vllmc.core.cache.signing import generate, public_text
from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Trust, Untrusted
from vllmc.core.cache.trust_store import add_key
from vllmc.core.errors import VllmcError

KEY, OTHER = generate(), generate()
ANY = Trust(unsigned=True)


@pytest.fixture
def packed(store: Store, warm, tmp_path: Path) -> Path:
    """A bundle of one program of two units, not signed."""
    warmed = warm(b"one", b"two" * 500)
    path = tmp_path / "packed.vllmc"
    export(store, [warmed.program], path)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store(tmp_path / "target", trust=ANY)


def refused(path: Path, target: Store, reason: str | None = None) -> None:
    """Imports what must be refused, and checks that nothing came of it."""
    before = sorted(target.root.rglob("*")) if target.root.exists() else []
    with pytest.raises(BadBundle, match=reason) as caught:
        import_bundle(target, path)
    assert caught.value.exit_code == 4
    assert str(path) in caught.value.message
    assert (sorted(target.root.rglob("*")) if target.root.exists() else []) == before


def test_what_goes_in_comes_out(store, warm, packed, target):
    done = import_bundle(target, packed)
    assert [p.model for p in done.programs] == ["tiny-llama"]
    assert (done.added, done.files) == (5, 5)
    program = done.programs[0]
    assert target.programs(program.key) == store.programs(program.key)
    for unit in program.units:
        assert target.unit(unit.key) == store.unit(unit.key)
        assert target.read_artifact(unit.artifact) == store.read_artifact(unit.artifact)
        known = target.unit(unit.key)
        assert known is not None
        assert target.find_code(known.code) == unit.artifact
    assert target.verify() == ()


def test_the_same_programs_give_the_same_bytes(store, warm, packed, target, tmp_path):
    import_bundle(target, packed)
    again = tmp_path / "again.vllmc"
    export(target, select(target, ["tiny-llama"]), again)
    assert again.read_bytes() == packed.read_bytes()


def test_importing_twice_adds_nothing(packed, target, files):
    import_bundle(target, packed)
    before = {k: v for k, v in files(target.root).items() if "/imports/" not in k}
    assert import_bundle(target, packed).added == 0
    assert {k: v for k, v in files(target.root).items() if "/imports/" not in k} == before


def test_a_bundle_is_a_tar_file_that_others_read(packed):
    with tarfile.open(packed) as archive:
        names = archive.getnames()
        assert names[0] == "vllmc-bundle.json"
        manifest = json.load(archive.extractfile("vllmc-bundle.json"))
    assert names[1:] == [row["path"] for row in manifest["files"]]


def test_the_manifest_says_what_was_compiled_with_what(store, make_unit, make_program, tmp_path):
    from vllmc.core.cache.key import Factor

    factors = (
        Factor(group="versions", name="torch", value="2.13.0", origin="probe"),
        Factor(group="versions", name="python_full", value="3.11.9", affects_key=False),
        Factor(group="system", name="device_isa", value="avx512", origin="probe"),
        Factor(group="environment", name="SECRET", value="<redacted>"),
    )
    program = make_program((), factors=factors)
    store.put_program(program)
    manifest = export(store, [program], tmp_path / "b")
    assert manifest.components == (
        {"name": "python", "version": "3.11.9"},
        {"name": "torch", "version": "2.13.0"},
    )
    [told] = manifest.programs
    assert told["key"] == program.key
    assert told["factors"] == {
        "versions.torch": "2.13.0",
        "versions.python_full": "3.11.9",
        "system.device_isa": "avx512",
    }


def test_an_unsigned_bundle_is_refused_before_it_is_parsed(packed, tmp_path):
    target = Store(tmp_path / "target", trust=Trust(keys=tmp_path / "trust"))
    with pytest.raises(Untrusted, match="it is not signed") as caught:
        import_bundle(target, packed)
    assert "--trust-unsigned" in caught.value.hint
    assert not target.root.exists()


def test_a_bundle_that_a_trusted_key_signed_is_taken_and_noted(store, warm, tmp_path):
    warmed = warm(b"one")
    path = tmp_path / "b"
    export(dataclasses.replace(store, signing=KEY), [warmed.program], path)
    trust = Trust(keys=tmp_path / "trust")
    target = Store(tmp_path / "target", trust=trust)
    with pytest.raises(Untrusted, match=KEY.public.hex()):
        import_bundle(target, path)
    add_key(trust, public_text(KEY.public, "ci"), "ci", "ci.pub")
    done = import_bundle(target, path, source="release.vllmc")
    assert str(done.vouched) == "signed by ci"
    [note] = imports_of(target, warmed.program.key)
    assert (note.source, note.signed_by) == ("release.vllmc", "ci")
    assert note.key == KEY.public.hex()
    assert imports_of(target, "0" * 64) == ()


def test_that_a_bundle_was_taken_unsigned_is_noted(packed, target):
    done = import_bundle(target, packed)
    [note] = imports_of(target, done.programs[0].key)
    assert (note.signed_by, note.key) == ("", "")
    assert "--trust-unsigned" in str(done.vouched)


def test_a_signature_that_does_not_hold_is_refused_whatever_is_allowed(packed, target, tmp_path):
    data = packed.read_bytes()
    size = int(data[124:135], 8)
    body = data[512 : 512 + size]
    line = KEY.signed(b"something else")[len(b"something else") :]
    path = tmp_path / "forged"
    path.write_bytes(repacked([("vllmc-bundle.json", body + line)], data))
    with pytest.raises(Untrusted, match="its signature is not of what it says"):
        import_bundle(target, path)


def test_imported_records_are_signed_where_the_cache_is_shared(packed, tmp_path):
    trust = Trust(keys=tmp_path / "trust")
    add_key(trust, public_text(KEY.public, "me"), "me", "me.pub")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    sealed = tmp_path / "sealed"
    source = Store(tmp_path / "source", trust=ANY)
    done = import_bundle(source, packed)
    export(dataclasses.replace(source, signing=KEY), done.programs, sealed)
    target = Store(shared, trust=trust)
    with pytest.raises(Untrusted, match="everybody may write"):
        import_bundle(target, sealed)
    import_bundle(dataclasses.replace(target, signing=KEY), sealed)
    assert target.programs(done.programs[0].key) == done.programs


def repacked(first: list[tuple[str, bytes]], original: bytes) -> bytes:
    """The members of `original` but for the manifest, behind other ones."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(original)) as archive:
        rest = [(m.name, archive.extractfile(m).read()) for m in archive.getmembers()[1:]]
    for name, data in first + rest:
        bundle.write_member(out, name, data)
    out.write(bytes(1024))
    return out.getvalue()


def with_manifest(original: bytes, change) -> bytes:
    """The bundle with another manifest: `change` is given the parsed one, and alters it."""
    size = int(original[124:135], 8)
    value = json.loads(original[512 : 512 + size])
    change(value)
    body = f"{canonical_json(value)}\n".encode()
    return repacked([("vllmc-bundle.json", body)], original)


PATHS = [
    "../../../etc/passwd",
    "/etc/passwd",
    "blobs/../blobs/aa/" + "a" * 64,
    "blobs//aa/" + "a" * 64,
    "./blobs/aa/" + "a" * 64,
    "used/" + "a" * 64,
    "locks/x.lock",
    "tmp/x",
    "imports/" + "a" * 64 + ".json",
    "codes/aa/" + "a" * 64,
    "blobs/aa/" + "A" * 64,
    "blobs/aa/" + "a" * 64 + "\n",
    "",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_a_bundle_has_no_business_with_is_refused(path, packed, target, tmp_path):
    def change(value):
        value["files"][0]["path"] = path

    packed.write_bytes(with_manifest(packed.read_bytes(), change))
    refused(packed, target, "its manifest says nothing|longer or shorter")


def listed_twice(value):
    value["files"].insert(0, value["files"][0])


def out_of_order(value):
    value["files"].reverse()


def of_another_size(value):
    value["files"][0]["bytes"] += 512


def huge(value):
    value["files"][0]["bytes"] = 1 << 62


def negative(value):
    value["files"][0]["bytes"] = -1


def no_number(value):
    value["files"][0]["bytes"] = True


def of_another_digest(value):
    value["files"][0]["sha256"] = "0" * 64


def more_said(value):
    value["run"] = "me"


def another_format(value):
    value["format"] = "tar"


def no_list(value):
    value["programs"] = {}


@pytest.mark.parametrize(
    "change",
    [
        listed_twice,
        out_of_order,
        of_another_size,
        huge,
        negative,
        no_number,
        of_another_digest,
        more_said,
        another_format,
        no_list,
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change, packed, target):
    packed.write_bytes(with_manifest(packed.read_bytes(), change))
    refused(packed, target)


def test_python_s_optimisation_leaves_no_check_out(packed, tmp_path):
    """Under -O assertions are not looked at."""
    original = packed.read_bytes()
    for number, change in enumerate([negative, no_number, more_said, another_format, no_list]):
        (tmp_path / f"odd{number}").write_bytes(with_manifest(original, change))
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vllmc.core.cache.bundle import BadBundle\n"
        "from vllmc.core.cache.exchange import read_manifest\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_manifest(Path(path))\n"
        "    except BadBundle as error: print(error.reason)\n"
    )
    paths = sorted(map(str, tmp_path.glob("odd*")))
    words = [sys.executable, "-O", "-c", script, *paths]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["its manifest says nothing that vllmc writes"] * len(paths)


def test_a_bundle_of_a_later_version_says_so(packed, target):
    packed.write_bytes(with_manifest(packed.read_bytes(), lambda v: v.update(version=2)))
    with pytest.raises(VllmcError) as caught:
        import_bundle(target, packed)
    assert caught.value.code == "format-too-new"


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_members_that_are_no_plain_files_are_refused(kind, packed, target):
    data = bytearray(packed.read_bytes())
    size = int(bytes(data[124:135]), 8)
    place = 512 + size + -size % 512
    with tarfile.open(packed) as archive:
        info = archive.getmembers()[1]
    info.type, info.linkname = kind, "/etc/passwd"
    data[place : place + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    packed.write_bytes(bytes(data))
    refused(packed, target, "there is something else")


def test_archives_within_archives_and_compressed_ones_are_refused(packed, target, tmp_path):
    data = packed.read_bytes()
    for number, other in enumerate(
        [
            gzip.compress(data),
            gzip.compress(bytes(1 << 20)),
            repacked([("vllmc-bundle.json", data)], data),
            repacked([("a.tar", data)], data),
            b"",
            bytes(4096),
            data[:-512],
            data + bytes(512),
            data + data,
        ]
    ):
        path = tmp_path / f"odd{number}"
        path.write_bytes(other)
        refused(path, target)


def test_a_manifest_that_is_nested_without_end_is_refused(packed, target):
    body = b"[" * 100_000 + b"]" * 100_000
    packed.write_bytes(repacked([("vllmc-bundle.json", body)], packed.read_bytes()))
    refused(packed, target)


def test_a_manifest_of_a_size_that_no_memory_holds_is_refused(packed, target):
    info = tarfile.TarInfo("vllmc-bundle.json")
    info.size = 1 << 32
    packed.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + packed.read_bytes()[512:])
    refused(packed, target, "would have 4294967296 bytes")


def test_a_directory_or_pipe_for_a_bundle_is_refused(target, tmp_path):
    refused(tmp_path, target, "not a plain file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", target, "not a plain file")


def test_a_bundle_is_read_through_a_link_as_the_hub_s_cache_has_it(packed, target, tmp_path):
    (tmp_path / "link").symlink_to(packed)
    assert import_bundle(target, tmp_path / "link").added == 5


def test_a_missing_bundle_is_an_error(target, tmp_path):
    with pytest.raises(VllmcError, match="there is no bundle") as caught:
        import_bundle(target, tmp_path / "none")
    assert caught.value.code == "no-bundle"


@pytest.mark.parametrize("lost", ["units/", "blobs/"])
def test_a_program_that_lacks_something_is_refused(lost, packed, target):
    with tarfile.open(packed) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers()[1:]}
    drop = next(name for name in files if name.startswith(lost))
    del files[drop]
    out = io.BytesIO()
    bundle.write(out, bundle.make_manifest(files, (), None), files)
    packed.write_bytes(out.getvalue())
    refused(packed, target, "it lacks")


def test_a_record_below_another_key_is_refused(packed, target):
    with tarfile.open(packed) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers()[1:]}
    first, second = (name for name in files if name.startswith("units/"))
    files[first] = files[second]
    out = io.BytesIO()
    bundle.write(out, bundle.make_manifest(files, (), None), files)
    packed.write_bytes(out.getvalue())
    refused(packed, target, "the record of something else")


def test_an_artifact_below_another_digest_is_refused(packed, target):
    with tarfile.open(packed) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers()[1:]}
    name = next(name for name in files if name.startswith("blobs/"))
    files[name] = b"something else"
    out = io.BytesIO()
    bundle.write(out, bundle.make_manifest(files, (), None), files)
    packed.write_bytes(out.getvalue())
    refused(packed, target, "another artifact")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_goes_unnoticed(data, packed, target):
    whole = packed.read_bytes()
    place = data.draw(st.integers(0, len(whole) * 8 - 1))
    flipped = bytearray(whole)
    flipped[place // 8] ^= 1 << place % 8
    path = packed.with_name("flipped")
    path.write_bytes(bytes(flipped))
    refused(path, target)


def test_what_is_cut_off_anywhere_is_refused(packed, target):
    whole = packed.read_bytes()
    chance = random.Random(7)
    path = packed.with_name("cut")
    for length in [0, 1, 511, 512, *(chance.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:length])
        refused(path, target)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=400))
def test_no_manifest_crashes_the_reader(body, packed, target):
    path = packed.with_name("fuzzed")
    path.write_bytes(repacked([("vllmc-bundle.json", body)], packed.read_bytes()))
    refused(path, target)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_in_a_manifest_crashes_the_reader(data, packed, target):
    whole = packed.read_bytes()
    size = int(whole[124:135], 8)
    value = json.loads(whole[512 : 512 + size])
    name = data.draw(st.sampled_from(sorted(value)))
    value[name] = data.draw(JSON)
    body = (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()
    path = packed.with_name("fuzzed")
    path.write_bytes(repacked([("vllmc-bundle.json", body)], whole))
    with suppress(BadBundle, FormatTooNew):
        import_bundle(target, path)
        # What is only told, of programs and components, may say anything.
        assert name in ("programs", "components") or value == json.loads(whole[512:][:size])


def test_programs_are_chosen_by_key_prefix_or_model(store, warm, make_program):

    one = warm(b"one", model="one").program
    two = warm(b"two", model="two").program
    assert select(store, ["one"]) == (one,)
    assert {p.key for p in select(store, ["one", two.key[:12], "one"])} == {one.key, two.key}
    for name in ("three", "f" * 64, "zz"):
        with pytest.raises(VllmcError, match="holds no program called") as caught:
            select(store, [name])
        assert caught.value.code == "unknown-key"
        assert "one" in caught.value.context["models"]


def test_a_program_whose_unit_is_gone_is_not_exported(store, warm, tmp_path):
    warmed = warm(b"one")
    store.layout.unit(warmed.units[0].key).unlink()
    with pytest.raises(VllmcError) as caught:
        export(store, [warmed.program], tmp_path / "b")
    assert caught.value.code == "missing-unit"
    assert not (tmp_path / "b").exists()


def test_a_bundle_that_cannot_be_written_leaves_nothing(store, warm, tmp_path):
    warmed = warm(b"one")
    with pytest.raises(VllmcError) as caught:
        export(store, [warmed.program], tmp_path / "none" / "b")
    assert caught.value.code == "cache-io-error"
    (tmp_path / "is").mkdir()
    (tmp_path / "is" / "old").write_bytes(b"")
    with pytest.raises(VllmcError):
        export(store, [warmed.program], tmp_path / "is")
    assert [p.name for p in tmp_path.iterdir() if "vllmc" in p.name or "is." in p.name] == []


def test_a_unit_that_is_here_already_keeps_the_artifact_that_programs_name(
    packed, target, make_unit, make_program
):
    mine = dataclasses.replace(make_unit(b"one"), artifact=sha256_hex(b"mine"), bytes=4)
    target.put_artifact(b"mine")
    target.put_unit(mine)
    program = make_program((mine,), model="mine")
    target.put_program(program)
    import_bundle(target, packed)
    assert target.unit(mine.key) == mine
    assert target.verify() == ()


@pytest.mark.parametrize("below", [False, True])
def test_a_unit_that_is_not_trusted_is_replaced(below, packed, make_unit, tmp_path):
    unit = make_unit(b"one")
    other = Store(tmp_path / "other")
    other.put_unit(unit)
    other.layout.unit(unit.key).chmod(0o666)
    own = Store(tmp_path / "own") if below else other
    export_from = Store(tmp_path / "source", trust=ANY)
    done = import_bundle(export_from, packed)
    sealed = tmp_path / "sealed"
    export(dataclasses.replace(export_from, signing=KEY), done.programs, sealed)
    trust = Trust(keys=tmp_path / "trust")
    add_key(trust, public_text(KEY.public, "ci"), "ci", "ci.pub")
    store = Store(own.root, (other.root,) if below else (), trust)
    import_bundle(store, sealed)
    assert store.unit(unit.key) is not None


def test_what_a_manifest_says_can_be_read_without_trust(packed):
    assert [row["model"] for row in read_manifest(packed).programs] == ["tiny-llama"]
