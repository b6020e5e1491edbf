"""Values from what Python printed of them, without evaluating anything. Imports no torch."""

from __future__ import annotations

import math
import re

from vllmc.core.cache.key import JsonValue
from vllmc.core.diagnose.foreign_files import Unreadable, clean, parse_literal

_LONGEST = 1 << 16
_LONGEST_INT = 1024
_DEEPEST = 20
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_CALL = re.compile(r"[A-Za-z_][\w.]*\((?P<fields>.*)\)", re.DOTALL)
_FIELD = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def without_addresses(text: str) -> str:
    """`text` without the addresses of objects, which differ from process to process."""
    return _ADDRESS.sub("", text)


def value_of(text: str) -> JsonValue:
    """The value that `text` was printed from, as JSON.

    Literals are themselves; `Name(field=value)` is an object of its fields; a list or tuple of
    such is a list. What is none of these stays the text that it is.
    """
    return _value(without_addresses(text), _DEEPEST) if len(text) <= _LONGEST else text


def _value(text: str, depth: int) -> JsonValue:
    text = text.strip()
    if depth == 0:
        return text
    try:
        return _json(parse_literal(text))
    except (Unreadable, ValueError):
        return _structure(text, depth)


def _json(value: object) -> JsonValue:
    """A literal as JSON; raises `ValueError` for what JSON does not have."""
    match value:
        case None | bool():
            return value
        case str():
            return clean(value)
        case int() if value.bit_length() <= _LONGEST_INT:
            return value
        case float() if math.isfinite(value):
            return value
        case list() | tuple():
            return [_json(item) for item in value]
        case dict():
            return {clean(str(key)): _json(item) for key, item in value.items()}
        case set() | frozenset():
            return [_json(item) for item in sorted(value, key=repr)]
    raise ValueError(f"{type(value).__name__} is no JSON")


def _structure(text: str, depth: int) -> JsonValue:
    if (call := _CALL.fullmatch(text)) is not None:
        fields = [_FIELD.fullmatch(item) for item in _items(call["fields"])]
        if fields and all(fields):
            return {f["name"]: _value(f["value"], depth - 1) for f in fields if f}
        return text
    if text[:1] in ("(", "[") and text[-1:] == _BRACKETS[text[0]]:
        return [_value(item, depth - 1) for item in _items(text[1:-1])]
    return text


def _items(text: str) -> list[str]:
    """`text` cut at its commas, those inside of brackets and quotes left alone."""
    items, start, closing, quote = [], 0, list[str](), ""
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote and text[index - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char in _BRACKETS:
            closing.append(_BRACKETS[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char == "," and not closing:
            items.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*items, last] if last else items
