"""What a remote is called, and what is said of one that cannot be used."""

from __future__ import annotations

import pytest

from vllmc.core.cache.remote import Remote, redacted
from vllmc.core.errors import VllmcError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("https://user:pw@host:8080/a/b", "https://host:8080/a/b"),
        ("https://token@host/a", "https://host/a"),
        ("https://host/a?sig=abc#d", "https://host/a"),
        ("s3://AKIA:se/cr+et@bucket/x", "s3://bucket/x"),
        ("hf://datasets/org/name@main/x", "hf://datasets/org/name@main/x"),
        ("https://user:p@ss?w#rd@host/a@b", "https://host/a@b"),
        ("https://host:8080/a?mail=x@y", "https://host:8080/a"),
        ("/srv/cache", "/srv/cache"),
        ("", ""),
    ],
)
def test_credentials_are_left_out_of_a_name(url, shown):
    assert redacted(url) == shown
    assert Remote(url=url).name == shown
    assert "se/cr" not in repr(Remote(url=url))


@pytest.mark.parametrize(
    "url", ["", "filecache::s3://b/x", "nothing://x", "zip://a::file:///b", "s3:/b/x", "http:b"]
)
def test_what_is_no_remote_is_wrong_usage(url):
    with pytest.raises(VllmcError) as caught:
        Remote(url=url).connect()
    assert (caught.value.code, caught.value.exit_code) == ("bad-remote", 2)


def test_a_package_that_is_lacking_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(VllmcError) as caught:
        Remote(url="gs://bucket/x").connect()
    assert caught.value.code == "no-remote-support"
    assert caught.value.hint == "pip install gcsfs"


@pytest.mark.parametrize(
    "told",
    [
        "cannot open https://user:p%40ss@host/a?sig=abcd%2F1 now",
        "user:p%40ss is not known",
        "password 'p@ss' is wrong",
        "GET /a?sig=abcd%2F1&x=1",
        "no such sig: abcd/1",
    ],
)
def test_a_cause_is_told_in_one_line_without_credentials(told, monkeypatch):
    import fsspec

    def refuse(*args: object, **options: object) -> None:
        raise OSError(f"first line\n  {told}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(VllmcError) as caught:
        Remote(url="memory://user:p%40ss@host/a?sig=abcd%2F1&x=1").connect()
    cause = caught.value.context["cause"]
    assert cause.startswith("OSError: first line ")
    assert not [secret for secret in ("p%40ss", "p@ss", "abcd") if secret in cause]
