"""How and where decorated modules are compiled: what `vllmc warm` takes as options.

Modules are made by code that knows nothing of vllmc, so this is ambient, like a forward context:
a module keeps what is in force where it is made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Trust
from vllmc.core.events import LogObserver, Observer
from vllmc.core.spec import CompileSpec

CACHE_DIR_VARIABLE: Final = "VLLMC_CACHE_DIR"
TRUST_DIR_VARIABLE: Final = "VLLMC_TRUST_DIR"
TRUST_UNSIGNED_VARIABLE: Final = "VLLMC_TRUST_UNSIGNED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The spec, whose device and dtype may be `auto`, the cache and who is told.

    `environment` is what the process was started with, as far as it is a factor of the key, and
    `since` when its modules began to be imported, in unix seconds. Without `may_compile` what the
    cache lacks is an error.
    """

    spec: CompileSpec
    store: Store
    environment: Mapping[str, str]
    observer: Observer
    may_compile: bool = True
    since: float


_CURRENT: ContextVar[Session | None] = ContextVar("vllmc_session", default=None)
_PLAIN: ContextVar[bool] = ContextVar("vllmc_plain", default=False)


@contextmanager
def compiling(
    spec: CompileSpec | None = None,
    *,
    cache_dir: Path | str | None = None,
    may_compile: bool = True,
    observer: Observer | None = None,
) -> Iterator[None]:
    """Decorated modules that are made within the block are compiled as `spec` says.

    Without one, and for modules made outside of any such block, for 1 to 8192 tokens, on the
    device and in the dtype of their own parameters. The cache is `cache_dir`, else the directories
    that VLLMC_CACHE_DIR names, else the user's cache directory: those of the `vllmc` command, and
    used on its terms (VLLMC_TRUST_DIR, VLLMC_TRUST_UNSIGNED). With `may_compile=False` a call whose
    program is not stored raises `CheckFailed` (`would-miss`). What happens is logged to the logger
    `vllmc`, unless an `observer` is given.
    """
    session = _make(spec, cache_dir, may_compile, observer)
    token = _CURRENT.set(session)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def plainly() -> Iterator[None]:
    """Within it, calls of decorated modules run their forward as it is."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def runs_plainly() -> bool:
    """Whether `plainly` is in force."""
    return _PLAIN.get()


def current_session() -> Session:
    """What is in force here, or the defaults."""
    return _CURRENT.get() or _make(None, None, True, None)


def _make(
    spec: CompileSpec | None,
    cache_dir: Path | str | None,
    may_compile: bool,
    observer: Observer | None,
) -> Session:
    # For a program that uses the library, this is the edge at which the environment is read.
    environment = dict(os.environ)
    listed = environment.get(CACHE_DIR_VARIABLE, "").split(os.pathsep)
    named = [str(cache_dir or ""), *([] if cache_dir else listed)]
    paths = [Path(text.strip()).expanduser().absolute() for text in named if text.strip()]
    first, *below = paths or [platformdirs.user_cache_path("vllmc")]
    return Session(
        spec=spec or CompileSpec(device="auto", dtype="auto"),
        store=Store(first, tuple(below), _trust(environment)),
        environment=environment,
        observer=observer or LogObserver(),
        may_compile=may_compile,
        since=_process_started(),
    )


def _trust(environment: Mapping[str, str]) -> Trust:
    keys = environment.get(TRUST_DIR_VARIABLE, "").strip()
    return Trust(
        keys=Path(keys).expanduser() if keys else None,
        unsigned=environment.get(TRUST_UNSIGNED_VARIABLE, "").strip() in ("1", "true"),
    )


def _process_started() -> float:
    """When this process began, in unix seconds: nothing was imported before."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="ascii")
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0.0
    # Field 22, the 20th after the name in parentheses, which may hold spaces: in ticks since boot.
    started = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (uptime - started)
