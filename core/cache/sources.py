"""The source files that capture traced: named relative to their package, verified by digest.

Names carry no path of this machine, so that a record holds in another virtual environment. Imports
no torch, and no module that it looks for.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

import xxhash
from vllmc.core.cache.record import SourceFile

MAIN: Final = "__main__"
"""The package of a script that was run; its `path` is the script's name."""

# Factors of their own: versions.torch_key, and group `code`.
_COVERED: Final = frozenset({"torch", "vllmc"})


def collect(code_files: Mapping[str, Collection[str]]) -> tuple[SourceFile, ...]:
    """The source files among `code_files`: `co_filename`s, and the functions traced in each.

    Left out are code without a file (`<string>`, frozen modules) and what the key covers anyway:
    torch's own files and vllmc's. A file that no loaded package holds is named after its module,
    and never verifies elsewhere; so does one that can no longer be read, with an empty digest.
    """
    homes = _homes()
    found: dict[tuple[str, str], SourceFile] = {}
    for file, functions in sorted(code_files.items()):
        if file.startswith("<"):
            continue
        package, path = _name(Path(file), homes)
        if package in _COVERED:
            continue
        before = found.get((package, path))
        found[package, path] = SourceFile(
            package=package,
            path=path,
            digest=_digest(Path(file)) or "",
            functions=tuple(sorted({*functions, *(before.functions if before else ())})),
        )
    return tuple(source for _, source in sorted(found.items()))


def verify(sources: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """Those of `sources` that are missing here or have changed, in their order."""
    directories = functools.cache(_directories)
    return tuple(
        source
        for source in sources
        if not source.digest or _digest_below(directories(source.package), source) != source.digest
    )


def _homes() -> dict[Path, tuple[str, Path]]:
    """Each loaded module's file, with its top-level package and the directory of that."""
    homes: dict[Path, tuple[str, Path]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str):
            continue
        if name == MAIN and (spec := getattr(module, "__spec__", None)) is not None:
            # `python -m package.module`: importable by its own name.
            name = spec.name
        top = name.partition(".")[0]
        for directory in _directories(top):
            if Path(file).is_relative_to(directory):
                # An importable name beats __main__, which stands for another file elsewhere.
                if homes.get(Path(file), (MAIN,))[0] == MAIN:
                    homes[Path(file)] = (top, directory)
                break
    return homes


def _name(file: Path, homes: Mapping[Path, tuple[str, Path]]) -> tuple[str, str]:
    if (home := homes.get(file)) is not None:
        return home[0], file.relative_to(home[1]).as_posix()
    # Run from a package without being a module of it (exec, a loader of its own).
    roots = {directory: top for top, directory in homes.values() if _is_package(top)}
    for parent in file.parents:
        if parent in roots:
            return roots[parent], file.relative_to(parent).as_posix()
    return file.stem, file.name


def _is_package(top: str) -> bool:
    return hasattr(sys.modules.get(top), "__path__")


def _directories(top: str) -> tuple[Path, ...]:
    """Where the files of a top-level package lie; for a single module, where its file lies."""
    module = sys.modules.get(top)
    if top == MAIN or (module is not None and getattr(module, "__spec__", None) is None):
        file = getattr(module, "__file__", None)
        return (Path(file).absolute().parent,) if isinstance(file, str) else ()
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        # A loaded module whose __spec__ was removed since.
        return ()
    return _spec_directories(spec) if spec is not None else ()


def _spec_directories(spec: importlib.machinery.ModuleSpec) -> tuple[Path, ...]:
    if spec.submodule_search_locations is not None:
        return tuple(Path(place) for place in spec.submodule_search_locations)
    return (Path(spec.origin).parent,) if spec.has_location and spec.origin else ()


def _digest_below(directories: Iterable[Path], source: SourceFile) -> str | None:
    for directory in directories:
        if (digest := _digest(directory / source.path)) is not None:
            return digest
    return None


def _digest(file: Path) -> str | None:
    try:
        return xxhash.xxh3_128_hexdigest(file.read_bytes())
    except OSError:
        return None
