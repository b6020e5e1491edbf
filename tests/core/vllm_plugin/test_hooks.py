"""What is wrapped behaves as before, whatever a release calls it with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vllmc.core.vllm_plugin import hooks, quiet
from vllmc.core.vllm_plugin.observation import Observation

AROUND = (
    hooks._environment,
    hooks._compiler,
    hooks._config,
    hooks._hash_of_fields,
    hooks._hash_of_text,
    hooks._backend_made,
    hooks._compiled,
    hooks._whole_key,
    hooks._forward,
    hooks._whole_path,
    hooks._whole_ready,
)


@pytest.fixture(autouse=True)
def in_the_middle_of_everything() -> Iterator[None]:
    """The state in which each wrapper has something to note."""
    quiet.WARNED.clear()
    hooks._NOW.whole = Observation(path="/none")
    hooks._NOW.parts.append([])
    with hooks.observing(Observation()):
        yield
    hooks._NOW.parts.pop()
    hooks._NOW.whole = None


@pytest.mark.parametrize("around", AROUND, ids=lambda around: around.__name__)
@pytest.mark.parametrize("given", [((), {}), ((1, 2, 3), {}), ((), {"a": 1})])
def test_strange_arguments_are_passed_on(around: Any, given: Any) -> None:
    args, keywords = given
    seen = []

    def original(*args: Any, **keywords: Any) -> str:
        seen.append((args, keywords))
        return "result"

    assert around(original, *args, **keywords) == "result"
    assert seen == [(args, keywords)]


@pytest.mark.parametrize("around", AROUND, ids=lambda around: around.__name__)
def test_what_vllm_raises_is_raised(around: Any) -> None:
    def original(*args: Any, **keywords: Any) -> None:
        raise KeyError("vLLM's own")

    with pytest.raises(KeyError, match="vLLM's own"):
        around(original)
    # And nothing is left behind.
    assert len(hooks._NOW.open) == len(hooks._NOW.parts) == 1


def test_what_is_hashed_later_is_no_part_of_the_key() -> None:
    for value in ({"A": 1}, {"A": 2}):
        hooks._environment(lambda value=value: value)
    assert hooks._NOW.open[-1].environment == {"A": 1}
