"""vLLM's compile caches, read from disk: what they are keyed by, hold, and repeat.

Nothing is unpickled or run, and no shape of a directory is an error: what was not understood is
said in `notes`. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

from vllmc.core.diagnose import vllm_layout
from vllmc.core.diagnose.foreign_files import (
    Content,
    Unreadable,
    clean,
    content_of,
    files_below,
    parse_json,
    read_text,
)
from vllmc.core.diagnose.vllm_factors import HASHES, KeyFacts, derived_key, key_facts
from vllmc.core.diagnose.vllm_graph import Graph, read_graph
from vllmc.core.diagnose.vllm_index import ANY_SIZE, Index, artifact_place, read_index
from vllmc.core.diagnose.vllm_layout import GRAPH, INDEX, MODEL, STORES
from vllmc.core.diagnose.vllm_recorded import Recorded, read_recorded
from vllmc.core.diagnose.vllm_recorded_format import FACTORS, RECORDED
from vllmc.core.errors import VllmcError

CacheKind: TypeAlias = Literal["compile", "aot"]

_KEY: Final = re.compile(r"[0-9a-f]{10}")
_MAX_INDEX: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One compiled piece for one range.

    `digest` is equal for equal contents, and empty where they were not read.
    """

    name: str
    range: str
    piece: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The absolute directories that files of one compilation name, and what they are for.

    `handles` are those of the index, and `moved` says that one is not where the index is;
    `sources` are the traced files; `artifacts` pairs a directory with how many artifacts mention
    it.
    """

    handles: tuple[str, ...] = ()
    moved: bool = False
    sources: tuple[str, ...] = ()
    artifacts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """What one rank stored for one part of the model (`backbone`, `eagle_head`).

    `label` is `rank_0_0/backbone`; `graph` is None where none is stored or readable. Of a
    `torch_aot_compile` tree it is what a rank stored, one artifact for the whole model.
    """

    label: str
    facts: KeyFacts
    graph: Graph | None
    index: Index
    artifacts: tuple[Artifact, ...]
    places: Places

    @property
    def ranges(self) -> tuple[str, ...]:
        """The token counts it was compiled for, as `start:end`."""
        found = [e.range for e in self.index.entries] + [a.range for a in self.artifacts]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCache:
    """All that vLLM stored under one key.

    `stores` are Inductor's and Triton's own caches inside of it and their sizes in bytes; `bytes`
    is the size of everything.
    """

    kind: CacheKind
    path: Path
    key: str
    compilations: tuple[Compilation, ...]
    stores: tuple[tuple[str, int], ...]
    bytes: int
    modified: float
    notes: tuple[str, ...]

    @property
    def main(self) -> Compilation | None:
        """The compilation that speaks for the others: the first rank's backbone."""
        return self.compilations[0] if self.compilations else None

    @property
    def release(self) -> str:
        """Which releases of vLLM may have written it; empty where that cannot be told."""
        return self.main.facts.release if self.main else ""

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts of all compilations."""
        return tuple(a for compilation in self.compilations for a in compilation.artifacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """How often artifacts repeat each other: `bytes` is what storing each once would save."""

    artifacts: int
    unique: int
    bytes: int


def duplicates(artifacts: Sequence[Artifact]) -> Duplicates:
    """Counts the artifacts of equal contents, which must have been read."""
    known = {artifact.digest: artifact.bytes for artifact in artifacts}
    return Duplicates(
        artifacts=len(artifacts),
        unique=len(known),
        bytes=sum(a.bytes for a in artifacts) - sum(known.values()),
    )


def read_caches(path: Path, *, contents: bool = False) -> tuple[VllmCache, ...]:
    """The caches in a directory, the oldest first.

    It may be the cache root, `torch_compile_cache`, one key's directory, one rank's or one
    prefix's; of the last two only that part is read. With `contents` every artifact is read, to
    find duplicates and paths. Raises `VllmcError` (`not-readable`, `no-vllm-cache`).
    """
    if not os.access(path, os.R_OK | os.X_OK):
        raise VllmcError(
            "not-readable", f"{path} cannot be read", hint="make it readable for this user"
        )
    found = vllm_layout.find_caches(path)
    if not found:
        raise VllmcError(
            "no-vllm-cache",
            f"{path} holds nothing that vLLM compiled",
            hint="give VLLM_CACHE_ROOT (~/.cache/vllm) or a directory below its "
            "torch_compile_cache that has rank_*_* directories",
        )
    caches = [_cache(one, contents) for one in found]
    return tuple(sorted(caches, key=lambda cache: (cache.modified, str(cache.path))))


def _cache(found: vllm_layout.Found, contents: bool) -> VllmCache:
    notes: list[str] = []
    directory = found.directory
    kind = _kind(directory)
    places = vllm_layout.ranks if kind == "aot" else vllm_layout.compilations
    read = _whole_model if kind == "aot" else _compilation
    compilations = tuple(
        read(place, clean(place.relative_to(directory).as_posix()), contents, notes)
        for place in places(directory)
        if place.is_relative_to(found.part)
    )
    if kind == "aot":
        if not any(compilation.facts.factors for compilation in compilations):
            notes.append(
                "a torch_aot_compile tree records no factors where vllmc's plugin did not run"
            )
        notes.append("its models, which are pickles, are not opened")
    elif not compilations:
        notes.append("no compilation was found in it")
    notes += _remarks(directory.name, compilations)
    return VllmCache(
        kind=kind,
        path=found.part,
        key=clean(directory.name),
        compilations=compilations,
        stores=_stores(directory),
        bytes=_size(found.part, notes),
        modified=_modified(directory),
        notes=tuple(notes),
    )


def _kind(directory: Path) -> CacheKind:
    models = (rank / MODEL for rank in vllm_layout.ranks(directory))
    below = directory.parent.name == vllm_layout.AOT_ROOT
    return "aot" if below or any(map(os.path.isfile, models)) else "compile"


def _remarks(name: str, compilations: Sequence[Compilation]) -> Iterator[str]:
    if not compilations:
        return
    main, *others = compilations
    derived = derived_key(main.facts)
    if derived and _KEY.fullmatch(name) and derived != name:
        yield (
            f"the recorded factors make the key {derived}, the directory is called {name}: "
            "it was renamed, or its factors were written by another start"
        )
    for other in others:
        known, mine = (replace(side.facts, fields=()) for side in (other, main))
        if known.factors and known != mine:
            yield f"{other.label} records other factors than {main.label}"


def _compilation(place: Path, label: str, contents: bool, notes: list[str]) -> Compilation:
    index = _index(place / INDEX, label, notes)
    graph = _graph(place / GRAPH, label, notes)
    artifacts, mentions = _artifacts(place, label, contents, notes)
    handles = {Path(e.path).parent for e in index.entries if e.path.startswith("/")}
    return Compilation(
        label=label,
        facts=_with_fields(_facts(place / FACTORS, label, notes), place, label, notes),
        graph=graph,
        index=index,
        artifacts=artifacts,
        places=Places(
            handles=tuple(sorted(map(str, handles))),
            moved=not all(handle.is_relative_to(place.parent) for handle in handles),
            sources=graph.sources if graph else (),
            artifacts=mentions,
        ),
    )


def _whole_model(rank: Path, label: str, contents: bool, notes: list[str]) -> Compilation:
    artifacts, mentions = _artifacts(rank, label, contents, notes)
    recorded = _recorded(rank, label, notes)
    return Compilation(
        label=label,
        facts=recorded.facts if recorded else KeyFacts(),
        graph=None,
        index=Index(),
        artifacts=artifacts,
        places=Places(artifacts=mentions),
    )


def _artifacts(
    place: Path, label: str, contents: bool, notes: list[str]
) -> tuple[tuple[Artifact, ...], tuple[tuple[str, int], ...]]:
    """The artifacts of a compilation, and how many of them mention which directory."""
    artifacts: list[Artifact] = []
    mentions: Counter[str] = Counter()
    for name in _names(place, label, notes):
        known = (ANY_SIZE, 0) if name == MODEL else artifact_place(name)
        if known is None:
            continue
        try:
            content = content_of(place / name) if contents else _unread(place / name)
        except Unreadable as error:
            notes.append(f"{label}/{name}: {error}")
            continue
        mentions.update(content.places)
        artifacts.append(
            Artifact(
                name=name,
                range=known[0],
                piece=known[1],
                bytes=content.bytes,
                digest=content.digest,
            )
        )
    artifacts.sort(key=lambda artifact: (artifact.piece, artifact.range))
    return tuple(artifacts), tuple(sorted(mentions.items()))


def _unread(path: Path) -> Content:
    return Content(digest="", bytes=_size(path, []), places=frozenset())


def _names(place: Path, label: str, notes: list[str]) -> list[str]:
    try:
        return sorted(child.name for child in place.iterdir())
    except OSError as error:
        notes.append(f"{label}: {error.strerror}")
        return []


def _graph(path: Path, label: str, notes: list[str]) -> Graph | None:
    try:
        return read_graph(read_text(path))
    except Unreadable as error:
        notes.append(f"{label}/{path.name}: {error}")
        return None


def _index(path: Path, label: str, notes: list[str]) -> Index:
    # With VLLM_USE_MEGA_AOT_ARTIFACT the artifacts are in the model file, and there is no index.
    if not os.path.lexists(path):
        return Index()
    try:
        index = read_index(read_text(path, _MAX_INDEX))
    except Unreadable as error:
        notes.append(f"{label}/{path.name}: {error}")
        return Index()
    if index.unknown:
        notes.append(f"{label}/{path.name}: {index.unknown} entries were not understood")
    return index


def _facts(path: Path, label: str, notes: list[str]) -> KeyFacts:
    try:
        value = parse_json(read_text(path))
        if not isinstance(value, dict):
            raise Unreadable(f"a {type(value).__name__} where an object belongs")
    except Unreadable as error:
        if isinstance(error.__cause__, FileNotFoundError):
            notes.append(f"{label}: there is no {path.name}: vLLM before 0.12 writes none")
        else:
            notes.append(f"{label}/{path.name}: {error}")
        return KeyFacts()
    environment = value.get("env")
    if not isinstance(environment, dict):
        notes.append(f"{label}/{path.name}: the environment's factors are missing")
        environment = {}
    hashes = _hashes(value)
    if missing := [name for name in HASHES if name not in hashes]:
        notes.append(f"{label}/{path.name}: no hash of the {', '.join(missing)}")
    if unknown := sorted(value.keys() - {"env", *(f"{name}_hash" for name in HASHES)}):
        names = ", ".join(clean(name) for name in unknown[:5])
        notes.append(f"{label}/{path.name}: not understood, and left out: {names}")
    return key_facts(environment, hashes)


def _with_fields(facts: KeyFacts, place: Path, label: str, notes: list[str]) -> KeyFacts:
    """The facts with the fields that vllmc's plugin recorded, where they are of the same start."""
    recorded = _recorded(place, label, notes)
    if recorded is None:
        return facts
    if not facts.factors:
        return recorded.facts
    hashes = {f.group: f.value for f in facts.factors if f.group in HASHES.values()}
    if any(recorded.hashes.get(name) != hashes.get(group) for name, group in HASHES.items()):
        notes.append(f"{label}/{RECORDED}: it is of another start than {FACTORS}, and left out")
        return facts
    return replace(facts, fields=recorded.facts.fields)


def _recorded(place: Path, label: str, notes: list[str]) -> Recorded | None:
    if not os.path.lexists(place / RECORDED):
        return None
    try:
        recorded = read_recorded(read_text(place / RECORDED))
    except Unreadable as error:
        notes.append(f"{label}/{RECORDED}: {error}")
        return None
    notes += [f"{label}/{RECORDED}: not recorded: {text}" for text in recorded.unread]
    if not recorded.rebuilds:
        notes.append(
            f"{label}/{RECORDED}: its fields do not make vLLM's key, so a field that counts may be "
            "missing among them"
        )
    return recorded


def _hashes(value: Mapping[str, object]) -> dict[str, str]:
    found = {name: value.get(f"{name}_hash") for name in HASHES}
    return {name: clean(digest) for name, digest in found.items() if isinstance(digest, str)}


def _stores(directory: Path) -> tuple[tuple[str, int], ...]:
    sizes: Counter[str] = Counter()
    for parent in (directory, *vllm_layout.ranks(directory)):
        for child in vllm_layout.subdirectories(parent):
            if child.name in STORES:
                sizes[child.name] += _size(child, [])
    return tuple(sorted(sizes.items()))


def _size(path: Path, notes: list[str]) -> int:
    try:
        if not path.is_dir():
            return path.lstat().st_size
        return sum(file.lstat().st_size for file in files_below(path))
    except OSError as error:
        notes.append(f"its size is not known: {error.strerror}")
        return 0


def _modified(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0
