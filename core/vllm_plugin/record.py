"""The contents of `vllmc_factors.json`, from what was observed.

Secrets are redacted, with the digest of the value under `hidden` so that two can be told to
differ. Absolute paths stay where vLLM hashes them: another path is another key.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vllmc.core.cache.key import JsonValue, canonical_json, sha256_hex
from vllmc.core.cache.redaction import redact
from vllmc.core.diagnose.foreign_files import clean_json
from vllmc.core.diagnose.vllm_recorded_format import FACTORS, FORMAT, VERSION
from vllmc.core.vllm_plugin.fields import config_fields
from vllmc.core.vllm_plugin.observation import Observation
from vllmc.core.vllm_plugin.sources import code_hash, sources

_RECORDED_HASHES: Final = ("config", "code", "compiler")
KNOWN_RELEASES: Final = ("0.32", "0.33")


def compile_record(observation: Observation, backend: Any, key: str) -> dict[str, JsonValue]:
    """What the compilation of one part of a model is keyed by; `key` names its directory."""
    record = key_record(observation)
    hashes = record["hashes"]
    assert isinstance(hashes, dict)
    hashes["code"] = code_hash(observation.traced)
    parts = [hashes[name] for name in ("env", "config", "code", "compiler")]
    if observation.shared:
        _check_hashes(record, hashes, Path(backend.compilation_config.local_cache_dir))
    else:
        _check(record, key, sha256_hex(str(parts))[:10])
    return record | {
        "tree": "compile",
        "key": key,
        "sources": sources(observation.traced),
        "compilation": compilation(backend.compilation_config)
        | {"prefix": str(backend.prefix), "passes": _passes(backend)},
    }


def whole_record(
    observation: Observation, key: str, traced: list[JsonValue]
) -> dict[str, JsonValue]:
    """What a whole model is keyed by, and the sources that it is checked against."""
    record = key_record(observation)
    hashes, forward = record["hashes"], observation.forward
    assert isinstance(hashes, dict)
    hashes["forward"] = forward.digest if forward else ""
    parts = [hashes["env"], hashes["config"], *(observation.compiler or ()), hashes["forward"]]
    model = observation.model
    _check(record, key, sha256_hex(str(parts)))
    return record | {
        "tree": "aot",
        "key": key,
        "forward": f"{forward.name}, line {forward.line}" if forward else "",
        "sources": traced,
        "compilation": compilation(model.compilation_config) | {"prefix": "", "passes": []},
    }


def key_record(observation: Observation) -> dict[str, JsonValue]:
    """What is known before anything is traced: environment, config, compiler and versions."""
    from vllmc.core.torch_compat.config_source import variables_read
    from vllmc.core.torch_compat.unhashed import unhashed_options

    hidden: dict[str, JsonValue] = {}
    environment = clean_json(observation.environment or {})
    assert isinstance(environment, dict)
    unread = list(_unread(observation))
    config: Mapping[str, JsonValue] = {}
    whole = False
    if observation.config is not None:
        found = config_fields(observation.config)
        config, whole = {"version": found.version, **found.values}, found.whole
        unread += found.unread
    compiler = _compiler(observation.compiler)
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": _versions(),
        "hashes": {
            "env": _environment_hash(observation.environment),
            "config": observation.config.digest if observation.config else "",
            "compiler": _compiler_hash(observation.compiler),
        },
        "env": _shown("env", environment, hidden),
        "config": _shown("config", config, hidden),
        "compiler": _shown("compiler", compiler, hidden),
        "private": _shown("private", unhashed_options(compiler), hidden),
        "variables": _shown("variables", variables_read(os.environ), hidden),
        "hidden": hidden,
        "rebuilds": whole,
        "not_read": [str(text) for text in unread],
    }


def _check(record: dict[str, JsonValue], key: str, made: str) -> None:
    """Notes whether what is recorded makes the key that the directory is named by."""
    unread = record["not_read"]
    assert isinstance(unread, list)
    record["rebuilds"] = record["rebuilds"] and made == key
    if made != key:
        unread.append(
            f"these factors make the key {made}, and the directory is called {key}: something else "
            "is hashed, or a source changed meanwhile"
        )


def _check_hashes(
    record: dict[str, JsonValue], hashes: Mapping[str, JsonValue], directory: Path
) -> None:
    """The same for a directory that is not named by this key, by what vLLM wrote into it."""
    unread = record["not_read"]
    assert isinstance(unread, list)
    written = json.loads((directory / FACTORS).read_bytes())
    different = [n for n in _RECORDED_HASHES if written.get(f"{n}_hash") != hashes[n]]
    record["rebuilds"] = record["rebuilds"] and not different
    if different:
        unread.append(
            f"the {' and the '.join(different)} that {FACTORS} has a hash of: it is of another "
            "start, in a directory that was chosen as cache_dir, or something else is hashed"
        )


def _shown(
    group: str, values: Mapping[str, JsonValue], hidden: dict[str, JsonValue]
) -> dict[str, JsonValue]:
    """The values without their secrets, of which the digests go into `hidden`."""
    shown: dict[str, JsonValue] = {}
    for name, value in values.items():
        if value is None or isinstance(value, (bool, int)):
            shown[name] = value
            continue
        # One that is not JSON (a NaN) becomes it here.
        known = clean_json(value)
        shown[name] = redact(name, known)
        if shown[name] != known:
            hidden[f"{group}.{name}"] = sha256_hex(canonical_json(known))
    return shown


def _unread(observation: Observation) -> Iterator[str]:
    release = ".".join(str(_version("vllm")).split(".")[:2])
    if release not in KNOWN_RELEASES:
        yield f"vLLM {release} is not known to this vllmc, which knows {', '.join(KNOWN_RELEASES)}"
    for name in observation.missing:
        yield f"this vLLM has no {name}"
    for name, value in (
        ("the environment", observation.environment),
        ("the config", observation.config),
    ):
        if value is None:
            yield f"{name}: vLLM hashed it in a way that is not known, or not at all"


def _compiler(factors: Sequence[Any] | None) -> dict[str, JsonValue]:
    """The system, torch's own key and the two configs that vLLM hashes, by dotted names."""
    match factors:
        case [dict() as system, bytes() as torch_key, dict() as inductor, dict() as functorch]:
            named = {"system": system, "inductor": inductor, "functorch": functorch}
            flat = {
                f"{group}.{name}": _spoken(value)
                for group, values in named.items()
                for name, value in values.items()
            }
            return {"torch_key": torch_key.hex(), **flat}
        case None | []:
            return {}
        case _:
            return {str(index): _spoken(value) for index, value in enumerate(factors)}


def _environment_hash(environment: Mapping[str, Any] | None) -> str:
    return "" if environment is None else sha256_hex(json.dumps(environment, sort_keys=True))


def _spoken(value: Any) -> JsonValue:
    """A value of a config as it is hashed, which is as Python prints it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _spoken(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spoken(item) for item in value]
    return repr(value)


def _compiler_hash(factors: Sequence[Any] | None) -> str:
    if factors is None:
        return ""
    from vllm.utils.hashing import safe_hash

    digest = safe_hash(str(list(factors)).encode(), usedforsecurity=False).hexdigest()
    return str(digest[:10])


def compilation(config: Any) -> dict[str, JsonValue]:
    """How a config has models compiled; what of it counts is among the hashed fields too."""
    return {
        "mode": getattr(config.mode, "name", str(config.mode)),
        "backend": str(config.backend),
        "splitting_ops": list(config.splitting_ops or ()),
        "ranges": [f"{r.start}:{r.end}" for r in config.get_compile_ranges()],
        "sizes": [size if isinstance(size, int) else str(size) for size in config.compile_sizes],
    }


def _passes(backend: Any) -> list[JsonValue]:
    """The passes over the graphs, which are in Inductor's keys of the pieces, in their order."""
    found: list[JsonValue] = []
    for slot, value in backend.inductor_config.items():
        if not callable(getattr(value, "uuid", None)):
            continue
        inner = getattr(value, "passes", None)
        parts = [value] if inner is None else [*inner, *vars(value).values()]
        for part in parts:
            if callable(getattr(part, "uuid", None)):
                uuid = clean_json(part.uuid())
                found.append({"slot": slot, "name": type(part).__qualname__, "uuid": uuid})
    return found


def _versions() -> dict[str, JsonValue]:
    # Not from the packages' metadata, which takes longer to read than all else here.
    import torch

    found = {name: _version(name) for name in ("vllm", "torch", "triton", "transformers")}
    return {
        **found,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    version = getattr(sys.modules.get(package), "__version__", None)
    return None if version is None else str(version)
