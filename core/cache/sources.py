"""The source files that capture traced: named relative to their package, verified by digest.

Names carry no path of this machine, so that a record holds in another virtual environment. Imports
no torch, and no module that it looks for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Final

import xxhash

from vllmc.core.cache.record import NO_DIGEST, SourceFile

MAIN: Final = "__main__"
"""The package of a script that was run; its `path` is the script's name."""

COVERED: Final = frozenset({"torch", "vllmc"})
"""The packages that are factors of their own: `versions.torch_key`, and group `code`."""


def collect(
    code_files: Mapping[str, Collection[str]],
    *,
    since: float = math.inf,
    covered: Collection[str] = COVERED,
) -> tuple[SourceFile, ...]:
    """The source files among `code_files`: `co_filename`s, and the functions traced in each.

    A file that changed at or after `since` (unix seconds, when modules were imported) may not be
    what was traced, so it gets no digest; nor does one that can no longer be read. Left out are
    code without a file (`<string>`, frozen modules) and the packages that are `covered` by other
    means. A file that no loaded package holds is named after its module, and never
    verifies elsewhere.
    """
    homes = _homes()
    found: dict[tuple[str, str], SourceFile] = {}
    for file, functions in sorted(code_files.items()):
        if file.startswith("<"):
            continue
        package, path = _name(Path(file).absolute(), homes)
        if package.partition(".")[0] in covered:
            continue
        before = found.get((package, path))
        found[package, path] = SourceFile(
            package=package,
            path=path,
            digest=(_digest(Path(file)) if _changed(Path(file)) < since else None) or NO_DIGEST,
            functions=tuple(sorted({*functions, *(before.functions if before else ())})),
        )
    return tuple(source for _, source in sorted(found.items()))


def verify(sources: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """Those of `sources` that are missing here or have changed, in their order."""
    directories = functools.cache(_directories)
    return tuple(
        source
        for source in sources
        if source.digest == NO_DIGEST
        or _digest_below(directories(source.package), source) != source.digest
    )


def current(sources: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """The files that `sources` name, as they are here now; missing ones are left out."""
    directories = functools.cache(_directories)
    return tuple(
        dataclasses.replace(source, digest=digest)
        for source in sources
        if (digest := _digest_below(directories(source.package), source)) is not None
    )


def _homes() -> dict[Path, tuple[str, Path]]:
    """Each loaded module's file, with its package and the directory that it is relative to."""
    homes: dict[Path, tuple[str, Path]] = {}
    directories = functools.cache(_directories)
    for name, module in list(sys.modules.items()):
        text = getattr(module, "__file__", None)
        if not isinstance(text, str):
            continue
        if name == MAIN and (spec := getattr(module, "__spec__", None)) is not None:
            # `python -m package.module`: importable by its own name.
            name = spec.name
        file = Path(text)
        # An importable name beats __main__, which stands for another file elsewhere.
        if homes.get(file, (MAIN,))[0] == MAIN and (home := _home(name, file, directories)):
            homes[file] = home
    return homes


def _home(
    name: str, file: Path, directories: Callable[[str], tuple[Path, ...]]
) -> tuple[str, Path] | None:
    parts = name.split(".")
    # Beyond the top level only where that is a namespace of packages that lie apart.
    for package in (".".join(parts[: n + 1]) for n in range(len(parts))):
        for directory in directories(package):
            if file.is_relative_to(directory):
                return package, directory
    return None


def _name(file: Path, homes: Mapping[Path, tuple[str, Path]]) -> tuple[str, str]:
    if (home := homes.get(file)) is not None:
        return home[0], file.relative_to(home[1]).as_posix()
    # Run from a package without being a module of it (exec, a loader of its own).
    roots = {directory: package for package, directory in homes.values() if _is_package(package)}
    for parent in file.parents:
        if parent in roots:
            return roots[parent], file.relative_to(parent).as_posix()
    return file.stem, file.name


def _is_package(name: str) -> bool:
    return hasattr(sys.modules.get(name), "__path__")


def _directories(package: str) -> tuple[Path, ...]:
    """Where the files of a package lie; for a single module, where its file lies."""
    module = sys.modules.get(package)
    if package == MAIN or (module is not None and getattr(module, "__spec__", None) is None):
        file = getattr(module, "__file__", None)
        return (Path(file).absolute().parent,) if isinstance(file, str) else ()
    spec = _spec(package)
    if spec is None:
        return ()
    if spec.submodule_search_locations is not None:
        return tuple(Path(place) for place in spec.submodule_search_locations)
    return (Path(spec.origin).parent,) if spec.has_location and spec.origin else ()


def _spec(package: str) -> ModuleSpec | None:
    parent = package.rpartition(".")[0]
    if parent:
        above = _spec(parent)
        # Looking below a package imports it. Importing a namespace runs nothing.
        if above is None or above.origin is not None or not above.submodule_search_locations:
            return None
    try:
        return importlib.util.find_spec(package)
    except (ValueError, ImportError):
        # A loaded module whose __spec__ was removed since, or what names no package.
        return None


def _digest_below(directories: Iterable[Path], source: SourceFile) -> str | None:
    for directory in directories:
        if (digest := _digest(directory / source.path)) is not None:
            return digest
    return None


def _changed(file: Path) -> float:
    """When the file or its name last changed, in unix seconds: now, if it is gone."""
    try:
        return file.stat().st_ctime
    except OSError:
        return math.inf


def _digest(file: Path) -> str | None:
    try:
        return xxhash.xxh3_128_hexdigest(file.read_bytes())
    except (OSError, ValueError):
        # What a record names need not be a name that a file can have.
        return None
