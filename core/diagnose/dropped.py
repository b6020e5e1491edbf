"""Guards that a stored program has dropped and a call has broken, told as Dynamo's are.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from vllmc.core.cache.expressions import spoken
from vllmc.core.cache.key import REDACTED, JsonValue, canonical_json
from vllmc.core.cache.record import UNREADABLE
from vllmc.core.diagnose.guards import Guard, RecompileClass, read_guard, shortened

_DIGEST = re.compile(r"#[0-9a-f]{16}")
_LONG = re.compile(r"sha256:[0-9a-f]{64}")


def size_guard(condition: str, sizes: Mapping[str, int]) -> Guard:
    """The guard on sizes that `condition` is, over `x.size()[0]`, where `sizes` break it."""
    (_, only), *others = sizes.items()
    observed = str(only) if not others else ", ".join(f"{s} = {n}" for s, n in sizes.items())
    return replace(read_guard(condition), observed=observed)


def value_guard(expression: str, before: JsonValue, after: JsonValue) -> Guard:
    """The guard on a Python value that `describe` told as `before` at capture and tells as `after`.

    `expression` is that of a record.
    """
    subject, expected, observed = spoken(expression), _told(before), _told(after)
    return Guard(
        entry="",
        text=shortened(f"{subject} {'is' if before is None else '=='} {expected}"),
        klass=_class_of(subject, before, after),
        subject=subject,
        expected=shortened(expected),
        observed=shortened(f"another {observed}" if observed == expected else observed),
    )


def _class_of(subject: str, before: JsonValue, after: JsonValue) -> RecompileClass:
    if UNREADABLE in (before, after):
        return "other"
    if subject.startswith("type(") or None in (before, after):
        return "type"
    if _is_object(before):
        return "object-id"
    if type(before) is not type(after):
        return "type"
    if type(before) is int:
        return "int"
    return "string" if isinstance(before, str) and _is_text(before) else "other"


def _is_object(value: JsonValue) -> bool:
    if not isinstance(value, str):
        return False
    return value.startswith(("<function ", "<module ")) or (
        value.startswith("<") and not value.startswith("<str ") and bool(_DIGEST.search(value))
    )


def _is_text(value: str) -> bool:
    return value.startswith("<str ") or not (value.startswith("<") or _LONG.fullmatch(value))


def _told(value: JsonValue) -> str:
    """What `describe` told of a value, for a person: without digests of code."""
    if value == UNREADABLE:
        return "nothing that can be read"
    if value == REDACTED or value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, str):
        if _LONG.fullmatch(value):
            return f"a long value ({value[:15]}...)"
        if _is_text(value):
            return repr(value[5:-1] if value.startswith("<str ") else value)
        return _DIGEST.sub("", value).removeprefix("<").removesuffix(">")
    return _DIGEST.sub("", canonical_json(value))
