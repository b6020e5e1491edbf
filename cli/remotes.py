"""`vllmc cache push` and `pull`: programs to a remote and from it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from vllmc.cli import render
from vllmc.cli.options import CommonFlags, command
from vllmc.core.cache import exchange, transfer
from vllmc.core.cache.remote import Remote
from vllmc.core.cache.transfer import Moved
from vllmc.core.errors import UnsafeCacheError

_Place = Annotated[
    str,
    typer.Argument(
        metavar="REMOTE",
        help="A URL (s3, gs, az, hf, http: read only) or a directory.",
    ),
]
_Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY|MODEL",
        show_default="all",
        help="Keys, their first 8 or more hex digits, or models: all programs of each.",
    ),
]


@command
def push(remote: _Place, common: CommonFlags, programs: _Names = None) -> None:
    """Send programs to a remote; only what it lacks is sent.

    A remote is laid out as a cache is, so it can also be mounted and named by --cache-dir. What
    names others is sent after them, so one that is cut off leaves nothing that refers to what is
    not there, and the next push goes on from it. With --sign-key records are signed, and who trusts
    the key pulls them as they are. A record that is there stays, unless nobody could use it: it is
    damaged, names what is not there, or should be signed and is not.

    With --json: remote (without user, password and query), sent (files), bytes, skipped (files
    that were there) and programs (keys).
    """
    store = common.settings().store()
    names = programs or sorted({outline.key for outline in store.outlines()})
    place = Remote(url=remote)
    output = common.output("cache push")
    with output.progress() as observer:
        done = transfer.push(place, store, exchange.select(store, names), observer)
    row = _row(place, "sent", done)
    output.data(row, lambda: render.moved("sent", row))
    if not done.programs:
        output.note(f"hint: the cache {store.root} holds no program; vllmc warm compiles one")


@command
def pull(remote: _Place, common: CommonFlags, programs: _Names = None) -> None:
    """Fetch programs from a remote; only what the cache lacks is fetched.

    A record is used if a key that `vllmc trust` lists signed it, or with --trust-unsigned. Each
    file is checked before anything refers to it. What is refused does not stop other programs; it
    ends in exit 4, with one error for each reason. A pull that was cut off goes on where it
    stopped, also within a file.

    With --json: remote (without user, password and query), fetched (files), bytes, skipped (files
    that were here) and programs (keys).
    """
    store = common.settings().store()
    place = Remote(url=remote)
    output = common.output("cache pull")
    with output.progress() as observer:
        done = transfer.pull(place, store, programs or (), observer)
    if done.refused:
        first, *others = _each_reason(done.refused)
        for error in others:
            output.complain(error)
        first.context["pulled"] = list(done.programs)
        raise first
    row = _row(place, "fetched", done)
    output.data(row, lambda: render.moved("fetched", row))
    if not done.programs:
        output.note(f"hint: {place.name} holds no program; is it the right URL?")


def _each_reason(refused: Iterable[UnsafeCacheError]) -> list[UnsafeCacheError]:
    """One error for each reason, which says how many others it is the reason of."""
    kinds: dict[tuple[str, object], list[UnsafeCacheError]] = {}
    for error in refused:
        kinds.setdefault((error.code, error.context.get("reason")), []).append(error)
    for first, *alike in kinds.values():
        if alike:
            first.context["refused_likewise"] = len(alike)
    return [errors[0] for errors in kinds.values()]


def _row(remote: Remote, verb: str, done: Moved) -> dict[str, object]:
    return {
        "remote": remote.name,
        verb: done.files,
        "bytes": done.bytes,
        "skipped": done.skipped,
        "programs": list(done.programs),
    }
