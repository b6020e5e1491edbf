"""Secrets: found by their name or their shape, and kept out of what is stored or printed.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from vllmc.core.cache.key import REDACTED, Factor, JsonValue

SECRET_PARTS: Final = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "credential",
    "api_key",
    "access_key",
    "private_key",
    "signing_key",
    "encryption_key",
    "ssh_key",
    "auth_token",
    "bearer",
    "authorization",
    "cookie",
)
"""What makes a name that of a secret wherever it stands in it; `_` may be left out."""

SECRET_LAST_WORDS: Final = ("token", "auth", "pat", "pwd")
"""What makes a name that of a secret as its last word."""

VOCABULARY: Final = (
    *("audio", "bos", "cls", "end", "eos", "image", "mask", "pad", "per", "sep", "special"),
    *("start", "stop", "unk", "video"),
)
"""Words before a last one that make it no secret: `eos_token` and its like name vocabulary."""

SHAPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tokens of Hugging Face": r"\bhf_[A-Za-z0-9]{16,}",
        "keys that begin with `sk-`": r"\bsk-[A-Za-z0-9_-]{16,}",
        "keys of Stripe": r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{10,}",
        "tokens of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,})",
        "tokens of GitLab": r"\bglpat-[\w-]{16,}",
        "tokens of npm and PyPI": r"\b(?:npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,})",
        "tokens of Slack": r"\bxox[abprs]-[\w-]{10,}",
        "keys of NVIDIA": r"\bnvapi-[\w-]{16,}",
        "keys of Google": r"\bAIza[\w-]{30,}",
        "key ids of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}",
        "JSON web tokens": r"\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*",
        "bearer tokens": r"\b[Bb]earer +[\w.~+/=-]{8,}",
        "private keys in PEM": r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
        r"(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
        "user and password in a URL": r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)",
        "assignments to a password or key": r"(?i:password|passwd|passphrase|secret|api_?key"
        r"|access_?key)[\"']?\s*[=:]\s*[\"']?[^\s\"',;&)}\]]{4,}",
    }
)
"""The shapes of secrets, as regular expressions."""

# `re` compiles them when they are needed, and most commands print nothing to redact.
_SECRET_PARTS: Final = "|".join(SECRET_PARTS).replace("_", "_?")
_VOCABULARY: Final = rf"(?:^|_)(?:{'|'.join(VOCABULARY)})_"
_SECRET_SHAPES: Final = "|".join(SHAPES.values())
_LONG_WORDS: Final = r"(?<![\w:#+/=-])[\w+/=-]{32,}"
_HEX: Final = r"[0-9a-f]{32,}|[0-9A-F]{32,}"
_CHANGES_KIND: Final = 0.4


def redact(name: str, value: JsonValue, *, random: bool = False) -> JsonValue:
    """`value`, with `<redacted>` for every text in it that is a secret by its name or its shape.

    `name` is that of an environment variable or option; within a dictionary each name counts too.
    With `random`, so is text that looks drawn at random, as keys in hex or base64 do. Numbers are
    never secret.
    """
    if isinstance(value, str):
        hidden = value and (
            _names_secret(name)
            or re.search(_SECRET_SHAPES, value, re.DOTALL)
            or (random and any(map(_looks_random, re.findall(_LONG_WORDS, value))))
        )
        return REDACTED if hidden else value
    if isinstance(value, list):
        return [redact(name, item, random=random) for item in value]
    if isinstance(value, dict):
        return {
            key: redact(name if _names_secret(name) else key, item, random=random)
            for key, item in value.items()
        }
    return value


def scrub(text: str) -> str:
    """`text`, with `<redacted>` in the place of each secret that shows by its shape."""
    return re.sub(_SECRET_SHAPES, REDACTED, text, flags=re.DOTALL)


def hide(factor: Factor) -> Factor:
    """`factor` with its secrets redacted, and a digest of the value that counts in its place.

    For what compilers read: it may shape code, so another secret must be another key. Of what
    somebody set, text that looks random counts as secret.
    """
    chosen = factor.origin.startswith(("env:", "file:", "flag"))
    shown = redact(factor.name, factor.value, random=chosen)
    if shown == factor.value:
        return factor
    return replace(factor, value=shown, hidden=factor.digest)


def _names_secret(name: str) -> bool:
    return bool(re.search(_SECRET_PARTS, name, re.IGNORECASE)) or any(
        map(_part_names_secret, name.split("."))
    )


def _part_names_secret(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    last = words[-1].lower() if words else ""
    if last == "key":
        # STRIPE_KEY is a secret by the custom of environment variables; sort_key is an option.
        return name.isupper() and "CACHE" not in name
    return last in SECRET_LAST_WORDS and not re.search(_VOCABULARY, name, re.IGNORECASE)


def _looks_random(word: str) -> bool:
    """Whether it is hex, or capitals, small letters and digits alternate as they do in no name."""
    kinds = [(c.isdigit(), c.isupper()) for c in word if c.isalnum()]
    if len(set(kinds)) < 2:
        return False
    changes = sum(a != b for a, b in pairwise(kinds))
    return bool(re.fullmatch(_HEX, word)) or changes >= _CHANGES_KIND * len(kinds)
