"""`--remote`: what the cache lacks is pulled, and nothing about a remote fails a run."""

from __future__ import annotations

import pytest

EAGER = ("--backend", "eager")
WARM = ("warm", *EAGER, "--json", "-q")


def test_a_program_is_pulled_before_it_is_compiled(vllmc, workplace, monkeypatch):
    assert vllmc(*WARM, "--cache-dir", "one").json["outcome"] == "compiled"
    assert vllmc("cache", "push", "remote", "--cache-dir", "one").code == 0

    monkeypatch.setenv("VLLMC_REMOTE", "remote")
    done = vllmc(*WARM, "--cache-dir", "two", "--trust-unsigned")
    assert (done.json["outcome"], done.err) == ("hit", "")

    # Where nobody signed it, it is refused; then it is compiled, or the command is.
    refused = vllmc("run", *EAGER, "--cache-dir", "three", "--fail-on-miss")
    assert (refused.code, refused.error) == (4, "untrusted")
    done = vllmc(*WARM, "--cache-dir", "three")
    assert (done.code, done.json["outcome"]) == (0, "compiled")
    assert done.err.count("warning[") == 1
    assert "warning[untrusted]" in done.err
    assert vllmc(*WARM, "--cache-dir", "three").err == ""


@pytest.mark.parametrize(
    "where",
    [
        # Where aiohttp is lacking, that is the warning.
        "http://127.0.0.1:9/cache",
        pytest.param("gs://bucket", marks=pytest.mark.thorough),
        pytest.param("file:///proc/1/mem/x", marks=pytest.mark.thorough),
    ],
)
def test_a_remote_that_is_down_fails_nothing(where, vllmc, workplace):
    done = vllmc(*WARM, "--remote", where)
    assert (done.code, done.json["outcome"]) == (0, "compiled")
    assert done.err.count("warning[") == (0 if where.startswith("file") else 1)
