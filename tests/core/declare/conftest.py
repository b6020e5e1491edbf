"""Compiling declared modules into a cache of the test's own, and counting what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from vllmc.core import CompileRange, CompileSpec, compiling
from vllmc.core.events import SilentObserver


class Compilations(SilentObserver):
    """Counts compile units by what became of them, and captures."""

    def __init__(self) -> None:
        self.units: list[str] = []
        self.captures = 0

    def stage(self, name: str) -> None:
        self.captures += name == "capture"

    def unit_finished(self, name: str, outcome: str, seconds: float) -> None:
        self.units.append(outcome)


@pytest.fixture
def seen() -> Compilations:
    return Compilations()


@pytest.fixture
def session(tmp_path: Path, seen: Compilations) -> Callable[..., AbstractContextManager[None]]:
    """`compiling` with the eager backend for 1 to 64 tokens; changes of the spec by keyword."""

    def make(*, may_compile: bool = True, **changes: Any) -> AbstractContextManager[None]:
        fields: dict[str, Any] = {
            "device": "auto",
            "dtype": "auto",
            "backend": "eager",
            "ranges": (CompileRange(1, 64),),
        }
        spec = CompileSpec(**(fields | changes))
        return compiling(spec, cache_dir=tmp_path / "cache", may_compile=may_compile, observer=seen)

    return make


@pytest.fixture(autouse=True)
def _within(session: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with session():
        yield
