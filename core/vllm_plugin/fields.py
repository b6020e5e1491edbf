"""The hashed fields of a config, by dotted names, from what its objects hashed. No torch."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from hashlib import md5, sha256
from typing import Any, Final

from vllmc.core.cache.key import JsonValue
from vllmc.core.vllm_plugin.observation import ConfigHash, Hashed

# What these objects hash is a list of values without their names.
_LISTED: Final[Mapping[str, tuple[str, ...]]] = {
    "scheduler_config": ("max_num_batched_tokens", "max_num_seqs"),
    "lora_config": (
        "max_lora_rank",
        "max_loras",
        "fully_sharded_loras",
        "lora_dtype",
        "enable_tower_connector_lora",
        "enable_mixed_moe_lora_format",
        "enable_moe_shared_loras",
        "max_lora_cls_labels",
        "target_modules",
    ),
    "model_config.multimodal_config": (
        "mm_encoder_attn_backend",
        "mm_encoder_tp_mode",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_path",
        "mm_device_do_normalize",
    ),
}
_NOTHING: Final = ("None", None, md5(b"[]", usedforsecurity=False).hexdigest())
_DEPTH: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFields:
    """The fields by dotted name, the release that is hashed with them, and what is not known.

    `whole` says that the config's hash was made again of the hashes in it, and each of these of
    fields that are here.
    """

    values: Mapping[str, JsonValue]
    version: str
    whole: bool
    unread: tuple[str, ...]


def config_fields(hashed: ConfigHash) -> ConfigFields:
    """What a config's hash is made of, named as its objects name it."""
    names = {id(hashed.config): ""}
    for identity, known in _names("", hashed.config):
        # A part refers to others, as speculation does to the model's config.
        names.setdefault(identity, known)
    values: dict[str, JsonValue] = {}
    unread: list[str] = []
    inner: dict[str, str] = {}
    summary: list[Any] = []
    for part in hashed.parts:
        name = names.get(id(part.owner))
        if part.owner is hashed.config and (found := _summary(part)) is not None:
            summary = found
            if not part.digest.startswith(hashed.digest) or not _makes(part.content, part.digest):
                unread.append("the config's hash: it is not made in the way that is known")
            continue
        if part.owner is hashed.config:
            name = "additional_config"
        if name is None:
            unread.append(f"{type(part.owner).__name__}: it is not found in the config")
            name = type(part.owner).__name__
        if not _makes(part.content, part.digest):
            unread.append(f"{name}: its hash is not made of its fields in the way that is known")
        inner[part.digest] = name
        values |= _part(name, part, inner)
    version, *digests = summary or [""]
    unknown = [digest for digest in digests if digest not in inner and digest not in _NOTHING]
    unread += [f"what the config's hash has as {digest}" for digest in unknown]
    return ConfigFields(
        values=values, version=str(version), whole=bool(summary) and not unread, unread=(*unread,)
    )


def readable(normal: Any, original: Any = None) -> JsonValue:
    """What vLLM hashed of a value, as JSON; `original` is what it is now, and says its type alone.

    Two values that are hashed alike are alike here, and others differ.
    """
    if isinstance(original, Enum) and isinstance(normal, tuple):
        with suppress(ValueError):
            # It was hashed as the name of its type and its value.
            return f"{type(original).__name__}.{type(original)(normal[-1]).name}"
    if isinstance(normal, str):
        return _text(normal)
    if normal is None or isinstance(normal, (bool, int, float)):
        return normal
    if is_dataclass(original) and _is_tagged(normal):
        inner = {name: readable(value, getattr(original, name, None)) for name, value in normal[1]}
        return {"class": normal[0], **inner}
    if isinstance(original, Mapping) and not isinstance(normal, Mapping):
        by_name = {str(key): value for key, value in original.items()}
        return {key: readable(value, by_name.get(key)) for key, value in normal}
    if isinstance(normal, Mapping):
        return {str(key): readable(value) for key, value in normal.items()}
    if isinstance(normal, Sequence):
        same = isinstance(original, Sequence) and len(original) == len(normal)
        originals = original if same else [None] * len(normal)
        return [readable(a, b) for a, b in zip(normal, originals, strict=True)]
    return str(normal)


def _makes(content: Mapping[str, Any] | bytes, digest: str) -> bool:
    """Whether the digest is that of the content."""
    if isinstance(content, Mapping):
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == digest
    # Where MD5 is forbidden vLLM takes SHA-256.
    found = sha256(content) if len(digest) == 64 else md5(content, usedforsecurity=False)
    return found.hexdigest() == digest


def _part(name: str, part: Hashed, inner: Mapping[str, str]) -> dict[str, JsonValue]:
    if isinstance(part.content, Mapping):
        return {
            f"{name}.{key}": readable(value, getattr(part.owner, key, None))
            for key, value in part.content.items()
            # The hash of an object that is a part of its own.
            if not (isinstance(value, str) and inner.get(value) == f"{name}.{key}")
        }
    text = part.content.decode("utf-8", "replace")
    values = _literal(text)
    if not isinstance(values, list):
        return {name: _text(text)}
    known = _LISTED.get(name, ())
    labels = known if len(known) == len(values) else [str(n) for n in range(len(values))]
    return {
        f"{name}.{key}": readable(value)
        for key, value in zip(labels, values, strict=True)
        if not (isinstance(value, str) and inner.get(value, "").startswith(f"{name}."))
    }


def _summary(part: Hashed) -> list[Any] | None:
    """The release and the hashes of all objects; None where `part` is something else."""
    if isinstance(part.content, Mapping):
        return None
    match _literal(part.content.decode("utf-8", "replace")):
        case [[str(), *_] as found]:
            return found
    return None


def _names(prefix: str, config: Any, depth: int = 0) -> Iterator[tuple[int, str]]:
    if depth == _DEPTH:
        return
    for field in fields(config):
        value = getattr(config, field.name, None)
        if is_dataclass(value) and hasattr(value, "compute_hash"):
            yield id(value), f"{prefix}{field.name}"
            yield from _names(f"{prefix}{field.name}.", value, depth + 1)


def _is_tagged(normal: Any) -> bool:
    return isinstance(normal, tuple) and len(normal) == 2 and isinstance(normal[1], tuple)


def _text(text: str) -> JsonValue:
    # The config of a model is hashed as the JSON that it prints.
    if text.startswith("{"):
        try:
            value: JsonValue = json.loads(text)
        except ValueError:
            return text
        return value
    return text


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(_Spelled().visit(ast.parse(text, mode="eval")))
    except (ValueError, SyntaxError):
        return None


class _Spelled(ast.NodeTransformer):
    """Has `torch.bfloat16`, which is no literal, stand as a text."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Constant(ast.unparse(node))
