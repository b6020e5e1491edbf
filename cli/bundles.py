"""`vllmc cache export`, `import` and `check-bundle`: programs as files."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vllmc.cli import render
from vllmc.cli.options import CommonFlags, CompileFlags, command, compile_request
from vllmc.cli.output import Output
from vllmc.core.cache import exchange
from vllmc.core.cache.bundle import Manifest
from vllmc.core.cache.exchange import Imported
from vllmc.core.cache.store import Store

Row = dict[str, Any]


@command
def export(
    programs: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY|MODEL...",
            help="Keys, their first 8 or more hex digits, or models: all programs of each.",
        ),
    ],
    output_file: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where the bundle goes.")
    ],
    common: CommonFlags,
) -> None:
    """Write programs, with all that they are linked from, to one file.

    The file depends on nothing but the programs, so the same give the same bytes. It is a tar file:
    tar tf lists it. With --sign-key it is signed, and who trusts the key imports it as it is.

    With --json: file, bytes, bundle (64 hex digits), signed_by (the public key, or null), files
    (path, bytes, sha256), programs (key, id, model, created, units, factors: what it was compiled
    with) and components (name, version).
    """
    settings = common.settings()
    store = settings.store()
    manifest = exchange.export(store, exchange.select(store, programs), output_file)
    row = {
        "file": str(output_file),
        "bytes": output_file.stat().st_size,
        **_manifest_row(manifest),
    }
    common.output("cache export").data(row, lambda: render.bundle(row))


@command
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A bundle, or a URL of one.")],
    common: CommonFlags,
) -> None:
    """Verify a bundle whole, then put its programs into the cache.

    A bundle runs code, so one is refused (exit 4) unless a key that `vllmc trust` lists signed it,
    or --trust-unsigned is given; `cache show` tells which it was. Of a URL the user, password and
    query open it, and are neither printed nor kept.

    With --json: what export prints of a bundle, vouched (how it came to be used), added (how many
    files are new) and imported (the programs' keys).
    """
    store = common.settings().store()
    output = common.output("cache import")
    name, done = _import(file, store, output)
    row = _imported_row(name, done)
    output.data(row, lambda: render.imported(row))


@command
def check_bundle(
    compilation: CompileFlags,
    common: CommonFlags,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A bundle, or a URL of one.")],
    model: Annotated[
        str,
        typer.Option("--for", metavar="MODEL", help="The model that would be served from it."),
    ],
) -> int:
    """Say whether a model would be served from a bundle here, without importing it.

    Exit 0: nothing would be compiled. Exit 3: something would, and the factors say why; or it
    cannot be known. Exit 4: the bundle is corrupt, or nobody who is trusted signed it.

    With --json: bundle (64 hex digits), vouched, and what warm --check prints of the model.
    """
    settings = common.settings()
    output = common.output("cache check-bundle")
    with tempfile.TemporaryDirectory(prefix="vllmc-bundle-") as directory:
        store = Store(Path(directory), trust=settings.trust)
        name, done = _import(file, store, output)
        output.note(f"{name}: {done.vouched}")

        from vllmc.cli import report
        from vllmc.cli.job import make
        from vllmc.cli.warm_rows import PREDICTED_CODES, Head, predicted_row

        job = make(settings, compile_request(settings, compilation, model))
        # What was imported was vouched for; who else may write there is no question.
        trusting = replace(store, trust=replace(settings.trust, unsigned=True))
        row = predicted_row(Head(name=job.model.name, attempts=1), job, trusting)
    told = {"bundle": done.manifest.id, "vouched": str(done.vouched), **row}
    output.data(told, lambda: report.warm([row]))
    return PREDICTED_CODES.get(row["outcome"], 0)


def _import(file: str, store: Store, output: Output) -> tuple[str, Imported]:
    """Imports the bundle in a file or at a URL; what to call it, and what was done."""
    if "://" not in file:
        return file, exchange.import_bundle(store, Path(file))
    from vllmc.core.cache.remote import Remote
    from vllmc.core.cache.transfer import downloaded

    remote = Remote(url=file)
    with output.progress() as observer, downloaded(remote, store, observer) as path:
        return remote.name, exchange.import_bundle(store, path, source=remote.name)


def _manifest_row(manifest: Manifest) -> Row:
    return {
        "bundle": manifest.id,
        "signed_by": manifest.signature and manifest.signature.key.hex(),
        "files": [
            {"path": item.path, "bytes": item.bytes, "sha256": item.sha256}
            for item in manifest.members
        ],
        "programs": list(manifest.programs),
        "components": list(manifest.components),
    }


def _imported_row(file: str, done: Imported) -> Row:
    return {
        "file": file,
        "vouched": str(done.vouched),
        "added": done.added,
        "imported": sorted({program.key for program in done.programs}),
        **_manifest_row(done.manifest),
    }
