"""Where things are in vLLM's cache directories, given any level of them. Imports no torch.

    torch_compile_cache/<key>/rank_<i>_<j>/<prefix>/    one compilation: factors, graph, artifacts
    [torch_compile_cache/]torch_aot_compile/<key>/rank_<i>_<j>/model     a whole model in one file

Where vllmc's plugin runs in vLLM it writes `vllmc_factors.json` beside either.

Before prefixes there were, a rank's directory was that of its compilation.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllmc.core.diagnose.vllm_index import artifact_place
from vllmc.core.diagnose.vllm_recorded_format import FACTORS

INDEX: Final = "vllm_compile_cache.py"
GRAPH: Final = "computation_graph.py"
MODEL: Final = "model"
AOT_ROOT: Final = "torch_aot_compile"
STORES: Final = ("inductor_cache", "triton_cache")

_ROOTS: Final = ("torch_compile_cache", AOT_ROOT)
_RANK: Final = re.compile(r"rank_(\d{1,9})_(\d{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A key's directory, and the part of it that was asked for: itself, a rank's or a prefix's."""

    directory: Path
    part: Path


def find_caches(path: Path) -> tuple[Found, ...]:
    """The keys' directories that `path` is, lies in, or is above of. Follows no deeper nesting."""
    whole = path.resolve()
    if _RANK.fullmatch(whole.name):
        return (Found(directory=whole.parent, part=whole),)
    if _RANK.fullmatch(whole.parent.name):
        return (Found(directory=whole.parents[1], part=whole),)
    return tuple(Found(directory=key, part=key) for key in _keys(whole))


def is_vllm_cache(path: Path) -> bool:
    """Whether a directory belongs to a cache of vLLM's, or is right above one."""
    return path.name in _ROOTS or bool(find_caches(path))


def ranks(directory: Path) -> tuple[Path, ...]:
    """The directories of the ranks in a key's directory, in their order."""
    found = []
    for child in subdirectories(directory):
        if (match := _RANK.fullmatch(child.name)) is not None:
            found.append((int(match[1]), int(match[2]), child))
    return tuple(child for _, _, child in sorted(found))


def compilations(directory: Path) -> tuple[Path, ...]:
    """The directories of compilations in a key's directory; of each rank the backbone first."""
    found: list[Path] = []
    for rank in ranks(directory):
        inner = [child for child in subdirectories(rank) if child.name not in STORES]
        inner.sort(key=lambda child: child.name != "backbone")
        found += [place for place in (rank, *inner) if _is_compilation(place)]
    return tuple(found)


def subdirectories(path: Path) -> tuple[Path, ...]:
    """The directories in a directory, by name; none where it cannot be read."""
    try:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if _is_directory(entry))
    except OSError:
        return ()
    return tuple(path / name for name in names)


def _keys(path: Path) -> list[Path]:
    if ranks(path):
        return [path]
    found: list[Path] = []
    for child in subdirectories(path):
        if child.name in _ROOTS:
            found += _keys(child)
        elif ranks(child):
            found.append(child)
    return found


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_compilation(place: Path) -> bool:
    try:
        names = [child.name for child in place.iterdir()]
    except OSError:
        # Taken for one, so that reading it says why it cannot be read.
        return True
    return any(name in (FACTORS, INDEX, GRAPH) or artifact_place(name) for name in names)
