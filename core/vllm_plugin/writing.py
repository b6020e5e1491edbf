"""Writes `vllmc_factors.json` beside what vLLM stored, unless it is there and says the same.

A file that makes the key of its directory is left alone, as the key is a hash over all that counts
in it; so a warm start reads one file and writes none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmc.core.diagnose.vllm_recorded_format import FORMAT, RECORDED, VERSION
from vllmc.core.vllm_plugin.observation import Observation
from vllmc.core.vllm_plugin.sources import inlined, sources


def write_compilation(observation: Observation, backend: Any) -> None:
    """Writes what a compilation is keyed by into its directory, where vLLM has made one."""
    directory = backend.compilation_config.local_cache_dir
    if not directory or not Path(directory).is_dir():
        return
    # `<key>/rank_0_0/<prefix>`
    prefix = [part for part in str(backend.prefix).split("/") if part]
    key = Path(directory).parents[len(prefix)].name
    place = Path(directory, RECORDED)
    if not _says(_written(place), key):
        from vllmc.core.vllm_plugin.record import compile_record

        _write(place, compile_record(observation, backend, key))


def write_whole_model(observation: Observation) -> None:
    """Writes what a whole model is keyed by beside it, where it was stored."""
    if not Path(observation.path).exists():
        return
    rank = Path(observation.path).parent
    key, place = rank.parent.name, rank / RECORDED
    found, traced = _written(place), sources(inlined(observation.model))
    # One key serves models that were made of other sources in turn.
    if not _says(found, key) or found.get("sources") != traced:
        from vllmc.core.vllm_plugin.record import whole_record

        _write(place, whole_record(observation, key, traced))


def _says(found: Mapping[str, Any], key: str) -> bool:
    return found.get("key") == key and found.get("rebuilds") is True


def _written(place: Path) -> Mapping[str, Any]:
    """What is there in the format that is written; empty where it is anything else."""
    try:
        found = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (
        FORMAT,
        VERSION,
    ):
        return {}
    return found


def _write(place: Path, record: Mapping[str, Any]) -> None:
    """Replaces the file as a whole, as another process of the same rank may write it too."""
    # A line for each part: `indent` would take ten times as long.
    parts = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    data = ("{\n" + ",\n".join(parts) + "\n}\n").encode()
    if place.is_file() and place.read_bytes() == data:
        return
    draft = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)
