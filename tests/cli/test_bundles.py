"""`vllmc cache export` and `import`: what is printed, refused and noted."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def exported(vllmc, stored, workplace: Path) -> Path:
    assert vllmc("cache", "export", "tiny-llama", "-o", "tiny.vllmc").code == 0
    return workplace / "tiny.vllmc"


def test_a_program_goes_out_and_comes_in(vllmc, stored, exported, workplace):
    row = vllmc("cache", "export", stored.program.key[:8], "-o", "again.vllmc", "--json").json
    assert (workplace / "again.vllmc").read_bytes() == exported.read_bytes()
    assert row["bytes"] == exported.stat().st_size
    assert row["signed_by"] is None
    assert [program["key"] for program in row["programs"]] == [stored.program.key]
    words = ("cache", "import", "tiny.vllmc", "--cache-dir", "other", "--trust-unsigned")
    taken = vllmc(*words, "--json").json
    assert (taken["added"], taken["imported"]) == (3, [stored.program.key])
    assert vllmc(*words, "--json").json["added"] == 0
    assert stored.unit.key in taken["files"][1]["path"]


def test_where_a_program_came_from_is_shown(vllmc, stored, exported):
    there = ("--cache-dir", "other")
    assert vllmc("cache", "import", "tiny.vllmc", *there, "--trust-unsigned").code == 0
    done = vllmc("cache", "show", stored.program.key[:8], *there)
    assert "from tiny.vllmc, not signed: --trust-unsigned" in done.out
    [note] = vllmc("cache", "show", stored.program.key[:8], *there, "--json").json["imports"]
    assert (note["source"], note["signed_by"]) == ("tiny.vllmc", "")
    assert vllmc("cache", "show", stored.program.key[:8], "--json").json["imports"] == []


def test_an_unsigned_bundle_is_refused_with_the_way_out(vllmc, exported, workplace):
    done = vllmc("cache", "import", "tiny.vllmc", "--cache-dir", "other")
    assert done.code == 4
    assert "error[untrusted]: tiny.vllmc is not trusted: it is not signed" in done.err
    assert "--trust-unsigned" in done.err
    assert not (workplace / "other").exists()


def test_a_damaged_bundle_is_refused_in_every_command(vllmc, exported):
    exported.write_bytes(exported.read_bytes()[:-100])
    for words in (
        ("cache", "import", "tiny.vllmc"),
        ("cache", "check-bundle", "tiny.vllmc", "--for", "tiny-llama"),
    ):
        done = vllmc(*words, "--trust-unsigned")
        assert done.code == 4
        assert "error[corrupt-bundle]: tiny.vllmc" in done.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("cache", "export", "-o", "x"), 2, "KEY|MODEL"),
        (("cache", "export", "tiny-llama"), 2, "-o"),
        (("cache", "export", "nothing", "-o", "x"), 1, "error[unknown-key]"),
        (("cache", "export", "tiny-llama", "-o", "none/x"), 1, "write to another file with -o"),
        (("cache", "export", "tiny-llama", "-o", "."), 1, "write to another file with -o"),
        (("cache", "import", "nothing"), 1, "error[no-bundle]"),
        (("cache", "check-bundle", "nothing", "--for", "tiny-llama"), 1, "error[no-bundle]"),
        (("cache", "check-bundle", "tiny.vllmc"), 2, "--for"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_so(words, code, says, vllmc, stored):
    done = vllmc(*words)
    assert (done.code, says in done.err) == (code, True), done.err
    assert "Traceback" not in done.err
