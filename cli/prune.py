"""`vllmc cache prune`: make the cache smaller. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from vllmc.cli import render
from vllmc.cli.options import CommonFlags, command
from vllmc.core.cache.prune import Pruned, execute, plan_prune
from vllmc.core.cache.retention import Criteria
from vllmc.core.errors import UsageError
from vllmc.core.torch_compat.version import installed_torch

_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]*)", re.ASCII)
_BYTES = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", start=1)},
}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@command
def prune(
    common: CommonFlags,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Remove the programs that were used the longest ago, until all files of the "
            "cache take no more than this: 5GB, 500MB, 1GiB.",
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="Remove the programs that were not used for this long: 30d, 12h, 2w.",
        ),
    ] = None,
    max_count: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Remove the programs that were used the longest ago, until N are left.",
        ),
    ] = None,
    other_torch: Annotated[
        bool,
        typer.Option(
            "--other-torch",
            help="Remove the programs of every torch version but the one that is installed here. "
            "Other environments that share the cache may still use them.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove programs from the cache, and what no program needs any more.

    Without an option that chooses programs, only what nothing refers to is removed. What a program
    that stays needs is kept, and so is a program that a process runs now. What nothing refers to
    is kept for an hour, as it may be of a model that is being compiled. Of several cache
    directories only the first is pruned.

    With --json, plan has a row for each file that is to go, in this order (kind: program, use,
    import, unit, code, artifact, fact or temporary; key, path, model, program, bytes, reason),
    removed those that did, and kept those that would have gone but for their reason. bytes_before
    and bytes_after are the sizes of all files. program and model are those that a file goes with,
    empty where nothing refers to it.
    """
    criteria = Criteria(
        max_bytes=None if max_size is None else parse_size(max_size),
        older_than=None if older_than is None else parse_age(older_than),
        max_count=max_count,
        other_torch=installed_torch() if other_torch else None,
    )
    output = common.output("cache prune")
    plan = plan_prune(common.settings().store(), criteria)
    done = Pruned(removed=(), kept=plan.kept) if dry_run else execute(plan)
    gone = plan.removals if dry_run else done.removed
    left = plan.bytes_before - sum(item.bytes for item in gone)
    row = {
        "dry_run": dry_run,
        "plan": [item.to_json() for item in plan.removals],
        "removed": [item.to_json() for item in done.removed],
        "kept": [item.to_json() for item in done.kept],
        "bytes_before": plan.bytes_before,
        "bytes_after": left,
    }
    output.data(row, lambda: render.pruned(row))
    if criteria.max_bytes is not None and left > criteria.max_bytes:
        output.note(f"the cache is still larger than {max_size}: what is left may not be removed")


def parse_size(text: str) -> int:
    """A number of bytes: `5GB`, `1.5 GiB`, `500`. Raises `UsageError` (`bad-size`)."""
    number, unit = _split(text)
    if unit not in _BYTES:
        raise UsageError(
            "bad-size",
            f"'{text}' is not a size",
            hint="give a number and a unit: 5GB, 500MB, 1GiB",
        )
    return int(number * _BYTES[unit])


def parse_age(text: str) -> float:
    """A number of seconds: `30d`, `12h`, `2w`. Raises `UsageError` (`bad-age`)."""
    number, unit = _split(text)
    if unit not in _SECONDS:
        raise UsageError(
            "bad-age",
            f"'{text}' is not an age",
            hint="give a number and a unit, which is one of s, min, h, d and w: 30d, 12h, 2w",
        )
    return number * _SECONDS[unit]


def _split(text: str) -> tuple[float, str]:
    """A number and its unit, in lower case; a unit that there is not where `text` is neither."""
    match = _QUANTITY.fullmatch(text.strip())
    return (float(match[1]), match[2].lower()) if match else (0.0, "?")
