"""Where decorated modules find their cache, and whose work they use."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmc.core import compiling
from vllmc.core.declare.session import current_session


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("VLLMC_CACHE_DIR", "VLLMC_TRUST_DIR", "VLLMC_TRUST_UNSIGNED"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_layers_and_trust_are_those_of_the_command(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VLLMC_CACHE_DIR", "/first:/below:/lowest")
    environment.setenv("VLLMC_TRUST_DIR", "/etc/vllmc/trust")
    with compiling():
        store = current_session().store
    assert (store.root, store.below) == (Path("/first"), (Path("/below"), Path("/lowest")))
    assert (store.trust.keys, store.trust.unsigned) == (Path("/etc/vllmc/trust"), False)
    environment.setenv("VLLMC_TRUST_UNSIGNED", "1")
    with compiling():
        assert current_session().store.trust.unsigned


def test_a_directory_that_is_given_is_the_only_one(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("VLLMC_CACHE_DIR", "/first:/below")
    with compiling(cache_dir=tmp_path):
        store = current_session().store
    assert (store.root, store.below) == (tmp_path, ())
