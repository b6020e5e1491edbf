"""Processors, memory and process groups: what workers are limited by and ended with."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

_CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_GIB: Final = 1 << 30
_ENOUGH: Final = 4 * _GIB


def usable_processors() -> int:
    """The processors that this process may use: its affinity, and its cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota, _, period = _text(_CPU_QUOTA).partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def worker_limit(jobs: int) -> int:
    """The memory in bytes that one of `jobs` workers may take, with its C++ compilers.

    4 GiB, or its share where the machine or the cgroup has less, but at least 1 GiB.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _text(_MEMORY_LIMIT).strip()
    if limit.isdecimal():
        total = min(total, int(limit))
    return max(_GIB, min(_ENOUGH, total // jobs))


def group_memory() -> dict[int, int]:
    """The resident memory in bytes of each process group; shared pages count in each process."""
    page = os.sysconf("SC_PAGE_SIZE")
    taken: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # After the name of the program, which may hold anything: man 5 proc, fields 3 on.
            fields = _text(entry / "stat").rpartition(")")[2].split()
            if fields:
                group = int(fields[2])
                taken[group] = taken.get(group, 0) + int(fields[21]) * page
    return taken


def kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Signals the process group of `pid`, with the compilers that it started, if there is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
