"""`vllmc cache push`, `pull` and `import URL`, and `--remote`: what they print and exit with."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def signed(vllmc, workplace, stored):
    """The stored program as a remote holds it, signed by a key that is trusted."""
    assert vllmc("trust", "keygen", "key").code == 0
    assert vllmc("cache", "push", "remote", "--sign-key", "key", "-q").code == 0
    assert vllmc("trust", "add", "key.pub").code == 0
    return workplace / "remote"


def test_push_and_pull_say_what_moved(vllmc, workplace, stored, signed):
    done = vllmc("cache", "push", "remote", "tiny-llama", "--json")
    key = stored.program.key
    assert done.json == {
        "schema_version": 1,
        "command": "cache push",
        "remote": "remote",
        "sent": 0,
        "bytes": 0,
        "skipped": 3,
        "programs": [key],
    }
    shutil.rmtree(stored.store.root)
    done = vllmc("cache", "pull", f"file://{signed}", key[:8])
    assert done.code == 0
    assert "3 files" in done.out
    assert key in done.out
    assert f"pull from file://{signed}\npull tiny-llama: 1 of 1" in done.err
    done = vllmc("cache", "pull", "remote", "--json")
    assert (done.json["fetched"], done.json["skipped"]) == (0, 3)
    assert vllmc("cache", "verify").code == 0


def test_who_trusts_nobody_pulls_nothing(vllmc, workplace, stored, signed):
    assert vllmc("trust", "rm", "key").code == 0
    shutil.rmtree(stored.store.root)
    done = vllmc("cache", "pull", "remote", "--json")
    assert done.code == 4
    assert done.json["error"]["code"] == "untrusted"
    assert done.json["error"]["context"]["pulled"] == []
    assert "vllmc trust add" in done.err
    assert vllmc("cache", "ls", "--json").json["entries"] == []
    assert vllmc("cache", "pull", "remote", "--trust-unsigned").code == 0


def test_a_reason_that_many_are_refused_for_is_told_once(vllmc, workplace, stored):
    assert vllmc("cache", "push", "remote", "-q").code == 0
    (path,) = (workplace / "remote/v1/programs").rglob("*.json")
    for key in ("a" * 64, "b" * 64):
        other = workplace / f"remote/v1/programs/{key[:2]}/{key}/{path.name}"
        other.parent.mkdir(parents=True)
        shutil.copy(path, other)
    done = vllmc("cache", "pull", "remote")
    assert (done.code, done.err.count("error[untrusted]")) == (4, 1)
    assert "refused_likewise: 2" in done.err
    # Of these two the path says something else; what is right is pulled.
    done = vllmc("cache", "pull", "remote", "--trust-unsigned", "--json")
    assert (done.code, done.err.count("error[corrupt-remote]")) == (4, 1)
    context = done.json["error"]["context"]
    assert (context["refused_likewise"], context["pulled"]) == (1, [stored.program.key])


def test_what_cannot_be_reached_is_named_without_credentials(vllmc, stored):
    pytest.importorskip("aiohttp")
    url = "http://user:s3cret@127.0.0.1:9/cache?token=hush"
    for words in (("cache", "pull", url), ("cache", "import", url)):
        done = vllmc(*words, "--json", "-vv")
        assert (done.code, done.json["error"]["code"]) == (1, "remote-failed")
        assert "http://127.0.0.1:9/cache" in done.err
        assert "s3cret" not in done.out + done.err
        assert "hush" not in done.out + done.err


def test_where_there_is_nothing_the_url_is_asked_after(vllmc, workplace):
    done = vllmc("cache", "pull", "nothing-here")
    assert done.code == 0
    assert "hint: nothing-here holds no program; is it the right URL?" in done.err


def test_where_there_is_nothing_to_push_that_is_said(vllmc, workplace):
    done = vllmc("cache", "push", "remote")
    assert done.code == 0
    assert "holds no program; vllmc warm compiles one" in done.err
    assert not (workplace / "remote").exists()


def test_a_push_that_was_not_signed_can_be_signed_later(vllmc, workplace, stored):
    assert vllmc("cache", "push", "remote", "-q").code == 0
    assert vllmc("trust", "keygen", "key").code == 0
    assert vllmc("trust", "add", "key.pub").code == 0
    shutil.copytree(stored.store.root, workplace / "kept")
    shutil.rmtree(stored.store.root)
    assert vllmc("cache", "pull", "remote").code == 4
    done = vllmc("cache", "push", "remote", "--sign-key", "key", "--cache-dir", "kept", "--json")
    assert done.json["sent"] == 2
    assert vllmc("cache", "pull", "remote").code == 0


def test_no_remote_is_wrong_usage(vllmc, stored):
    done = vllmc("cache", "push", "nothing://x")
    assert done.code == 2
    assert "error[bad-remote]" in done.err


def test_a_bundle_at_a_url_is_checked_where_it_is(vllmc, workplace, stored):
    assert vllmc("cache", "export", "tiny-llama", "-o", "tiny.vllmc").code == 0
    for name, code, says in (
        ("none", 1, "error[no-bundle]: there is no bundle file://"),
        ("tiny.vllmc", 4, "tiny.vllmc is not trusted: it is not signed"),
    ):
        url = f"file://{workplace}/{name}"
        done = vllmc("cache", "check-bundle", url, "--for", "tiny-llama")
        assert (done.code, says in done.err) == (code, True), done.err


def test_a_bundle_is_imported_from_a_url(vllmc, workplace, stored):
    bundle = workplace / "all.vllmc"
    assert vllmc("cache", "export", "tiny-llama", "-o", str(bundle)).code == 0
    shutil.rmtree(stored.store.root)
    url = f"file://{bundle}"
    assert vllmc("cache", "import", url).code == 4
    done = vllmc("cache", "import", url, "--trust-unsigned", "--json")
    assert (done.json["file"], done.json["added"]) == (url, 3)
    (note,) = (stored.store.layout.top / "imports").iterdir()
    assert url in note.read_text()
    assert list(stored.store.layout.temporary.iterdir()) == []
    missing = vllmc("cache", "import", f"{url}.none")
    assert (missing.code, "error[no-bundle]" in missing.err) == (1, True)
