"""The edge between the plugin and vLLM: no failure of the plugin's passes it. Imports no torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LOG: Final = logging.getLogger("vllmc.vllm_plugin")
WARNED: Final = threading.Event()
"""Set once this process has warned."""


@contextmanager
def quietly(what: str) -> Iterator[None]:
    """Runs a block of the plugin's own; of a process's first failure it warns, and no more."""
    try:
        yield
    except Exception as error:
        if not WARNED.is_set():
            WARNED.set()
            _LOG.warning(
                "vllmc: what vLLM's compile cache is keyed by is not recorded, which changes "
                "nothing else (VLLMC_PLUGIN=0 switches this off): %s",
                f"{what}: {type(error).__name__}: {error}",
            )
