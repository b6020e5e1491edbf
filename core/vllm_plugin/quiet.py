"""The edge between the plugin and vLLM: no failure of the plugin's passes it. Imports no torch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LOG: Final = logging.getLogger("vllmc.vllm_plugin")


@contextmanager
def quietly(what: str) -> Iterator[None]:
    """Runs a block of the plugin's own; of a process's first failure it warns, and no more."""
    try:
        yield
    except Exception as error:
        _warn_once(f"{what}: {type(error).__name__}: {error}")


def _warn_once(text: str) -> None:
    _warn()(text)


class _Voice:
    """Says one thing, once."""

    def __init__(self) -> None:
        self._quiet = False

    def __call__(self, text: str) -> None:
        if not self._quiet:
            self._quiet = True
            _LOG.warning(
                "vllmc: what vLLM's compile cache is keyed by is not recorded, which changes "
                "nothing else (VLLMC_PLUGIN=0 switches this off): %s",
                text,
            )


@functools.cache
def _warn() -> _Voice:
    return _Voice()
