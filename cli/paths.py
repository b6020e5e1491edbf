"""Paths as a person writes them: with a home in them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllmc.core.errors import VllmcError


def expanded(path: Path) -> Path:
    """`path` with the home that its `~` stands for. Raises `VllmcError` (`no-home-directory`)."""
    with at_home(str(path)):
        return path.expanduser()


@contextmanager
def at_home(path: str) -> Iterator[None]:
    """Raises `VllmcError` (`no-home-directory`) for a user without one, on the way to `path`."""
    try:
        yield
    except RuntimeError as error:
        raise VllmcError(
            "no-home-directory",
            f"there is no home directory to find {path} in: {error}",
            context={"path": path},
            hint="set HOME, or write the path out; VLLMC_CACHE_DIR names the cache's directory",
        ) from error
