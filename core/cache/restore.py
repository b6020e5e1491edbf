"""How to get back the value of a factor, and with it the hit: in words that can be typed.

Imports no torch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Final

from vllmc.core.cache.key import REDACTED, JsonValue, canonical_json

_SPEC_FLAGS: Final[Mapping[str, str]] = {
    "device": "--device",
    "dtype": "--dtype",
    "ranges": "--compile-range",
    "sizes": "--compile-size",
    "dynamic_shapes": "--dynamic-shapes",
    "layer_names": "--layer-names",
    "experts": "--experts",
    "splitting_ops": "--splitting-op",
    "split_kv_update": "--split-kv-update",
    "backend": "--backend",
}
_PACKAGES: Final = frozenset({"torch", "triton", "transformers"})


def restoring(
    group: str,
    name: str,
    before: JsonValue,
    *,
    origin_before: str | None,
    origin_after: str | None,
) -> str:
    """What makes the factor `before` again; empty where only warming again helps.

    The origins are those of `Factor`, None on the side where the factor is absent.
    """
    how, _, what = (origin_after or "").partition(":")
    if how == "env" and origin_before in (None, "default", "vllmc"):
        return f"unset {what}"
    if how == "file" and origin_before in (None, "default", "vllmc"):
        return f"remove it from {what}"
    if REDACTED in canonical_json(before):
        return ""
    variable = (origin_before or "").partition(":")
    if group == "environment" and variable[0] == "env" and isinstance(before, str):
        # Of a file the contents count, and what the variable said is not recorded.
        if not before.startswith("file:"):
            return f"export {variable[2]}={shlex.quote(before)}"
        return f"set {variable[2]} to the same file"
    if group in ("inductor", "functorch"):
        return _option(group, name, before, how, origin_before)
    if group == "spec":
        return _flag(name, before, how, origin_before)
    if group == "passes":
        return _pass(name, before, how)
    if group == "versions":
        return f"pip install {name}=={before}" if name in _PACKAGES else ""
    if group == "model" and name.rpartition(".")[2] == "num_hidden_layers":
        return "leave out --layers" if how == "flag" else f"--layers {before}"
    return ""


def _option(group: str, name: str, before: JsonValue, how: str, origin: str | None) -> str:
    full = name if group == "inductor" else f"functorch.{name}"
    if how == "flag" and origin in ("default", "vllmc"):
        return f"leave out -O {full}"
    if isinstance(before, dict) or (isinstance(before, str) and before.startswith("path:")):
        return ""
    text = before if isinstance(before, str) else json.dumps(before)
    return f"-O {shlex.quote(f'{full}={text}')}"


def _pass(name: str, before: JsonValue, how: str) -> str:
    if before is None:
        return f"leave out --pass {name}" if how == "flag" else f"--no-pass {name}"
    tokens = before.get("tokens") if isinstance(before, dict) else None
    if tokens is not None:
        return f"--pass {name}@{tokens}"
    return f"leave out --no-pass {name}" if how == "flag" else f"--pass {name}"


def _flag(name: str, before: JsonValue, how: str, origin: str | None) -> str:
    flag = _SPEC_FLAGS.get(name)
    if flag is None:
        return ""
    if how == "flag" and origin == "default":
        return f"leave out {flag}"
    if isinstance(before, bool):
        return flag if before else flag.replace("--", "--no-", 1)
    values = before if isinstance(before, list) else [before]
    return " ".join(f"{flag} {shlex.quote(str(value))}" for value in values)
