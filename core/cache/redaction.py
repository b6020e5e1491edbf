"""Secrets: found by their name or their shape, and kept out of what is stored or printed.

Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Final

from vllmc.core.cache.key import REDACTED, Factor, JsonValue

_SECRET_PARTS: Final = re.compile(
    r"password|passwd|passphrase|secret|credential|api_?key|access_?key|private_?key|signing_?key"
    r"|encryption_?key|ssh_?key|auth_?token|bearer|authorization|cookie",
    re.IGNORECASE,
)
_SECRET_LAST_WORDS: Final = frozenset({"token", "auth", "pat", "pwd"})
# `eos_token` and its like name vocabulary.
_VOCABULARY: Final = re.compile(
    r"(?:^|_)(?:audio|bos|cls|end|eos|image|mask|pad|per|sep|special|start|stop|unk|video)_",
    re.IGNORECASE,
)
_SECRET_SHAPES: Final = re.compile(
    r"""
      \b(?: hf_[A-Za-z0-9]{16,}
          | sk-[A-Za-z0-9_-]{16,}
          | [rs]k_(?:live|test)_[A-Za-z0-9]{10,}
          | gh[pousr]_[A-Za-z0-9]{16,}
          | github_pat_\w{16,}
          | glpat-[\w-]{16,}
          | npm_[A-Za-z0-9]{30,}
          | pypi-[\w-]{40,}
          | xox[abprs]-[\w-]{10,}
          | nvapi-[\w-]{16,}
          | AIza[\w-]{30,}
          | (?:AKIA|ASIA)[A-Z0-9]{16}
          | eyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*
          | [Bb]earer[ ]+[\w.~+/=-]{8,}
        )
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----(?:.*?-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|.*)
    | (?<=://)[^/\s:@]*:[^/\s@]+(?=@)
    | (?i:password|passwd|passphrase|secret|api_?key|access_?key)["']?\s*[=:]\s*["']?
      [^\s"',;&)}\]]{4,}
    """,
    re.VERBOSE | re.DOTALL,
)
_LONG_WORDS: Final = re.compile(r"(?<![\w:#+/=-])[\w+/=-]{32,}")
_HEX: Final = re.compile(r"[0-9a-f]{32,}|[0-9A-F]{32,}")
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
            or _SECRET_SHAPES.search(value)
            or (random and any(map(_looks_random, _LONG_WORDS.findall(value))))
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
    return _SECRET_SHAPES.sub(REDACTED, text)


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
    return bool(_SECRET_PARTS.search(name)) or any(map(_part_names_secret, name.split(".")))


def _part_names_secret(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    last = words[-1].lower() if words else ""
    if last == "key":
        # STRIPE_KEY is a secret by the custom of environment variables; sort_key is an option.
        return name.isupper() and "CACHE" not in name
    return last in _SECRET_LAST_WORDS and not _VOCABULARY.search(name)


def _looks_random(word: str) -> bool:
    """Whether it is hex, or capitals, small letters and digits alternate as they do in no name."""
    kinds = [(c.isdigit(), c.isupper()) for c in word if c.isalnum()]
    if len(set(kinds)) < 2:
        return False
    changes = sum(a != b for a, b in pairwise(kinds))
    return bool(_HEX.fullmatch(word)) or changes >= _CHANGES_KIND * len(kinds)
