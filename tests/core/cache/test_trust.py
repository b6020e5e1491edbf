"""What is used: what nobody else may have written, what is signed, what the user asks for."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.cache import facts
from vllmc.core.cache.layout import Layout
from vllmc.core.cache.signing import generate, public_text
from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Trust, Untrusted
from vllmc.core.cache.trust_store import add_key, list_keys, remove_key
from vllmc.core.errors import UnsafeCacheError, UsageError, VllmcError

KEY, OTHER = generate(), generate()

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    """A trust store in which there is `KEY`."""
    trust = Trust(keys=tmp_path / "trust")
    add_key(trust, public_text(KEY.public, "ci"), "ci", "ci.pub")
    return trust


@pytest.fixture
def warmed(warm):
    return warm(b"artifact")


@pytest.fixture
def signed(store: Store, trust: Trust, warmed) -> Store:
    """A cache of what is `warmed`, signed."""
    store = dataclasses.replace(store, trust=trust, signing=KEY)
    store.put_unit(warmed.units[0])
    store.put_program(warmed.program)
    return store


def reads(store: Store, warmed) -> tuple[object, object]:
    return store.unit(warmed.units[0].key), store.programs(warmed.program.key)


def open_to(store: Store, mode: int) -> None:
    store.root.chmod(mode)


@pytest.mark.parametrize(
    ("mode", "reason"), [(0o770, "its group may write"), (0o707, "everybody may write")]
)
def test_a_cache_that_others_write_to_is_refused(mode, reason, store, warmed):
    open_to(store, mode)
    for use in (store.unit, store.programs):
        key = warmed.units[0].key if use == store.unit else warmed.program.key
        with pytest.raises(Untrusted, match=reason) as caught:
            use(key)
        assert caught.value.exit_code == 4
        assert str(store.root) in caught.value.message
        assert "--trust-unsigned" in caught.value.hint
    assert store.find_code(warmed.units[0].code) is None
    assert {problem.kind for problem in store.verify()} == {"untrusted"}
    # To be looked at it need not be trusted, nor to find nothing in it.
    assert [entry.key for entry in store.entries()] == [warmed.program.key]
    assert store.unit("0" * 64) is None


def test_a_record_that_others_write_to_is_refused_in_a_directory_of_ones_own(store, warmed):
    path = store.layout.unit(warmed.units[0].key)
    path.chmod(0o666)
    with pytest.raises(Untrusted, match="everybody may write") as caught:
        store.unit(warmed.units[0].key)
    assert str(path) in caught.value.message
    assert len(store.programs(warmed.program.key)) == 1


@as_root
def test_what_another_user_wrote_is_refused(store, warmed):
    os.chown(store.layout.unit(warmed.units[0].key), 4321, -1)
    with pytest.raises(Untrusted, match="it belongs to user 4321"):
        store.unit(warmed.units[0].key)
    other = dataclasses.replace(store, trust=Trust(user=4321))
    assert other.unit(warmed.units[0].key) is not None
    os.chown(store.root, 1234, -1)
    with pytest.raises(Untrusted, match="it belongs to user 1234"):
        store.programs(warmed.program.key)


@as_root
def test_what_root_wrote_is_used(store, warmed):
    store = dataclasses.replace(store, trust=Trust(user=4321))
    assert None not in reads(store, warmed)


def test_who_asks_for_it_uses_anything(store, warmed):
    open_to(store, 0o777)
    store = dataclasses.replace(store, trust=Trust(unsigned=True))
    assert None not in reads(store, warmed)
    assert store.find_code(warmed.units[0].code) is not None
    assert store.verify() == ()
    store.check_writable()


def test_what_a_trusted_key_signed_is_used(signed, warmed):
    open_to(signed, 0o777)
    assert reads(signed, warmed) == (warmed.units[0], (warmed.program,))
    assert signed.verify() == ()
    # A note that says which artifact holds some code has no signature.
    assert signed.find_code(warmed.units[0].code) is None


def test_what_a_strange_key_signed_is_refused(signed, warmed):
    store = dataclasses.replace(signed, signing=OTHER)
    store.put_unit(warmed.units[0])
    open_to(store, 0o777)
    with pytest.raises(Untrusted, match=OTHER.public.hex()) as caught:
        store.unit(warmed.units[0].key)
    assert "vllmc trust add" in caught.value.hint


def test_a_key_that_is_no_longer_trusted_signs_nothing(signed, warmed):
    open_to(signed, 0o777)
    remove_key(signed.trust, "ci")
    with pytest.raises(Untrusted, match="not in the trust store"):
        signed.unit(warmed.units[0].key)


def test_a_signature_of_something_else_is_refused_and_found(signed, warmed, make_unit):
    path = signed.layout.unit(warmed.units[0].key)
    # What an attacker can do: the signature of a record below another record.
    body = path.read_bytes().splitlines(keepends=True)
    other = KEY.signed(b"another record").splitlines(keepends=True)[-1]
    path.write_bytes(body[0] + other)
    assert [p.kind for p in signed.verify()] == ["corrupt-record"]
    open_to(signed, 0o777)
    with pytest.raises(Untrusted, match="its signature is not of what it says"):
        signed.unit(warmed.units[0].key)


def test_nothing_of_an_untrusted_record_is_parsed(store, warmed):
    store.layout.unit(warmed.units[0].key).write_bytes(b"{ not even a record")
    open_to(store, 0o777)
    with pytest.raises(Untrusted):
        store.unit(warmed.units[0].key)


def test_one_learns_before_compiling_that_a_cache_would_not_be_used(store, trust, tmp_path):
    store.check_writable()  # it is made by who writes first
    store.root.mkdir()
    open_to(store, 0o777)
    with pytest.raises(Untrusted, match="everybody may write"):
        store.check_writable()
    dataclasses.replace(store, trust=trust, signing=KEY).check_writable()
    with pytest.raises(Untrusted, match="the key that would sign"):
        dataclasses.replace(store, trust=trust, signing=OTHER).check_writable()


def test_what_we_make_is_ours_alone_whatever_the_umask(store, warm):
    before = os.umask(0)
    try:
        warm(b"artifact")
    finally:
        os.umask(before)
    made = [store.root, *store.root.rglob("*")]
    assert {p.stat().st_mode & 0o777 for p in made if p.is_dir()} == {0o700}
    assert {p.stat().st_mode & 0o777 for p in made if p.is_file()} == {0o644}


def test_a_fact_that_others_may_have_written_is_found_anew(tmp_path):
    facts.remember(tmp_path, "torch_key-x", "right")
    assert facts.recall(tmp_path, "torch_key-x") == "right"
    Layout(tmp_path).fact("torch_key-x").chmod(0o666)
    assert facts.recall(tmp_path, "torch_key-x") is None


def test_a_fact_is_no_answer_to_another_question(tmp_path):
    facts.remember(tmp_path, "model-a", "right")
    path = Layout(tmp_path).fact("model-a")
    path.rename(path.with_name("model-b"))
    assert facts.recall(tmp_path, "model-b") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_what_is_no_fact_is_found_anew(tmp_path, data):
    path = Layout(tmp_path).fact("model-a")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    assert facts.recall(tmp_path, "model-a") is None


def test_a_fact_is_not_written_to_what_another_put_in_its_place(tmp_path, monkeypatch):
    """In a directory that others write to a file may become a link once it is made."""
    aim = tmp_path / "aim"
    aim.write_text("precious")
    made = os.open

    def swapped(path, flags, *rest, **more):
        descriptor = made(path, flags, *rest, **more)
        if flags & os.O_CREAT and Path(path).parent == Layout(tmp_path).temporary:
            Path(path).unlink()
            Path(path).symlink_to(aim)
        return descriptor

    monkeypatch.setattr(os, "open", swapped)
    facts.remember(tmp_path, "torch_key-x", "right")
    assert Layout(tmp_path).fact("torch_key-x").is_symlink(), "nothing was swapped"
    assert aim.read_text() == "precious"


def test_keys_are_added_listed_and_removed(trust):
    add_key(trust, public_text(OTHER.public, "x"), "laptop", "laptop.pub")
    assert [(k.name, k.key) for k in list_keys(trust)] == [
        ("ci", KEY.public),
        ("laptop", OTHER.public),
    ]
    assert remove_key(trust, OTHER.public.hex()[:8]).name == "laptop"
    assert remove_key(trust, "ci").key == KEY.public
    assert list_keys(trust) == ()
    with pytest.raises(VllmcError, match="no key 'ci'"):
        remove_key(trust, "ci")


def test_no_key_takes_the_place_of_another(trust):
    with pytest.raises(VllmcError, match="another key called 'ci'") as caught:
        add_key(trust, public_text(OTHER.public, "x"), "ci", "x.pub")
    assert caught.value.code == "key-name-taken"
    assert [k.key for k in list_keys(trust)] == [KEY.public]


def test_a_key_that_is_there_keeps_its_name(trust):
    assert add_key(trust, public_text(KEY.public, "x"), "again", "x.pub").name == "ci"
    assert [k.name for k in list_keys(trust)] == ["ci"]


@pytest.mark.parametrize("wanted", ["again", "ci", KEY.public.hex()], ids=["new", "old", "key"])
def test_a_key_that_is_removed_is_trusted_under_no_other_name(wanted, trust, tmp_path):
    (tmp_path / "trust" / "again.pub").write_text(public_text(KEY.public, "again"))
    assert remove_key(trust, wanted).key == KEY.public
    assert list_keys(trust) == ()


def test_no_key_is_added_to_a_trust_store_that_is_not_believed(trust, tmp_path):
    (tmp_path / "trust").chmod(0o777)
    with pytest.raises(UnsafeCacheError, match="everybody may write"):
        add_key(trust, public_text(OTHER.public, "x"), "other", "x.pub")
    assert not (tmp_path / "trust" / "other.pub").exists()


@pytest.mark.parametrize("name", ["", "..", "../x", "a b", "x" * 65, ".hidden", "a/b"])
def test_a_key_has_a_name_that_stays_in_the_trust_store(name, trust):
    with pytest.raises(UsageError):
        add_key(trust, public_text(OTHER.public, "x"), name, "x.pub")


def test_a_trust_store_that_others_write_to_is_not_believed(trust, tmp_path):
    (tmp_path / "trust" / "ci.pub").chmod(0o666)
    with pytest.raises(UnsafeCacheError, match="everybody may write"):
        list_keys(trust)
    (tmp_path / "trust" / "ci.pub").chmod(0o644)
    (tmp_path / "trust").chmod(0o770)
    with pytest.raises(UnsafeCacheError, match="its group may write"):
        list_keys(trust)
    (tmp_path / "trust").chmod(0o700)
    (tmp_path / "trust" / "link.pub").symlink_to(tmp_path / "trust" / "ci.pub")
    with pytest.raises(UnsafeCacheError, match="a symbolic link"):
        list_keys(trust)


@pytest.mark.parametrize("what", ["record", "artifact"])
def test_a_file_without_end_is_corrupt_before_it_takes_all_memory(store, warm, what):
    warmed = warm(b"artifact")
    [unit] = warmed.units
    path = store.layout.unit(unit.key) if what == "record" else store.layout.blob(unit.artifact)
    path.chmod(0o600)
    os.truncate(path, 1 << 40)
    read = (
        (lambda: store.unit(unit.key))
        if what == "record"
        else (lambda: store.read_artifact(unit.artifact))
    )
    with pytest.raises(UnsafeCacheError) as caught:
        read()
    assert caught.value.code == f"corrupt-{what}"
