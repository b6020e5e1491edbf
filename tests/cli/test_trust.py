"""`vllmc trust`, and what is refused because nobody vouches for it."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vllmc.core.cache.signing import generate, public_text

Run = Callable[..., object]


@pytest.fixture
def key(vllmc, workplace: Path) -> Path:
    assert vllmc("trust", "keygen", "release").code == 0
    return workplace / "release"


def test_a_pair_of_keys_is_made_and_never_overwritten(vllmc, key):
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    done = vllmc("trust", "keygen", "release")
    assert done.code == 1
    assert "error[exists]" in done.err
    assert key.read_bytes() == before


def test_no_private_key_is_made_without_its_public_one(vllmc, workplace):
    (workplace / "half.pub").write_text("of another pair")
    done = vllmc("trust", "keygen", "half")
    assert (done.code, "error[exists]: half.pub" in done.err) == (1, True)
    assert not (workplace / "half").exists()
    done = vllmc("trust", "keygen", "none/key")
    assert done.code == 1
    assert "name another file" in done.err


def test_a_public_key_goes_in_is_listed_and_goes(vllmc, key):
    added = vllmc("trust", "add", "release.pub", "--json").json["added"]
    assert added["name"] == "release"
    assert vllmc("trust", "ls", "--json").json["keys"] == [added]
    assert added["key"] in vllmc("trust", "ls").out
    assert vllmc("trust", "rm", added["key"][:8], "--json").json["removed"] == added
    assert vllmc("trust", "ls").out == "no key is trusted\n"


def test_a_key_from_a_pipe_takes_a_name(vllmc, monkeypatch):
    import io

    text = public_text(generate().public, "x")
    assert vllmc("trust", "add", "-").code == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert vllmc("trust", "add", "-", "--name", "piped").code == 0
    assert vllmc("trust", "ls", "--json").json["keys"][0]["name"] == "piped"


@pytest.mark.parametrize("given", ["none.pub", "release"])
def test_what_is_no_public_key_is_an_error(given, vllmc, key):
    done = vllmc("trust", "add", given)
    assert done.code == 1
    assert "error[bad-public-key]" in done.err
    assert given in done.err


def test_a_cache_that_anybody_writes_to_is_not_used(vllmc, stored, key, workplace):
    stored.store.root.chmod(0o777)
    done = vllmc("cache", "verify", "--json")
    assert done.code == 4
    assert {row["kind"] for row in done.json["problems"]} == {"untrusted"}
    assert "everybody may write" in done.json["problems"][0]["detail"]
    assert vllmc("cache", "verify", "--trust-unsigned").code == 0
    # Looking is no use of it.
    assert vllmc("cache", "ls", "--json").json["entries"][0]["key"] == stored.program.key


def test_a_file_cannot_say_that_its_directory_is_trusted(vllmc, workplace):
    (workplace / "vllmc.toml").write_text("trust-unsigned = true\n")
    done = vllmc("cache", "ls")
    assert done.code == 2
    assert "vllmc.toml:1" in done.err
    assert "VLLMC_TRUST_UNSIGNED" in done.err


def test_layers_are_given_by_flags_a_variable_or_a_file(vllmc, stored, workplace, monkeypatch):
    first, below = workplace / "first", stored.store.root
    listed = vllmc("cache", "ls", "--json", "--cache-dir", str(first), "--cache-dir", str(below))
    assert [row["key"] for row in listed.json["entries"]] == [stored.program.key]
    monkeypatch.setenv("VLLMC_CACHE_DIR", f"{first}:{below}")
    assert vllmc("cache", "ls", "--json").json["entries"] == listed.json["entries"]
    where = vllmc("cache", "path", "--json").json
    assert (where["path"], where["below"]) == (str(first), [str(below)])
    monkeypatch.delenv("VLLMC_CACHE_DIR")
    for text in (f'cache-dir = ["first", "{below}"]\n', f'cache-dir = "first:{below}"\n'):
        (workplace / "vllmc.toml").write_text(text)
        assert vllmc("cache", "ls", "--json").json["entries"] == listed.json["entries"]
    assert not first.exists()


def test_a_key_to_sign_with_that_is_none_is_found_before_anything_is_done(vllmc, workplace):
    done = vllmc("warm", "--backend", "eager", "--sign-key", "none")
    assert done.code == 1
    assert "error[bad-signing-key]" in done.err
    assert not (workplace.parent / "cache").exists()
