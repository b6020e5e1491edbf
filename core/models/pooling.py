"""How an encoder's hidden states become one embedding, as sentence-transformers stores it.

Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from vllmc.core.errors import VllmcError

Pooling: TypeAlias = Literal["cls", "mean", "last"]

POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
DEFAULT_POOLING: Final[Pooling] = "mean"

# The older form has one flag for each mode, the newer one names the mode.
_FLAGS: Final[dict[str, Pooling]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Final[dict[str, Pooling]] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_APPLIED = frozenset({"Transformer", "Pooling"})


def stored_pooling(directory: Path | None) -> Pooling | None:
    """The pooling that `1_Pooling/config.json` of a model's directory asks for; None without one.

    Raises `VllmcError` (`unsupported-pooling`) for one that vllmc does not do, `bad-config` for a
    file that says none.
    """
    path = directory / "1_Pooling" / "config.json" if directory is not None else None
    if path is None or not path.is_file():
        return None
    fields = _read(path, dict)
    named = fields.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [*named] if isinstance(named, list) else []
    modes += [key for key, on in fields.items() if key.startswith("pooling_mode_") and on is True]
    known = [_NAMES.get(str(mode)) or _FLAGS.get(str(mode)) for mode in modes]
    if len(known) == 1 and known[0] is not None:
        return known[0]
    if not modes:
        raise _bad_config(path, "it names no pooling mode")
    raise VllmcError(
        "unsupported-pooling",
        f"the model pools by {' and '.join(map(str, modes))}, which vllmc does not do",
        context={"file": str(path)},
        hint=f"--pooling {'|'.join(POOLINGS)} takes another",
    )


def steps_left_out(directory: Path | None) -> tuple[str, ...]:
    """What `modules.json` of a model's directory does to embeddings after pooling, by its names.

    Raises `VllmcError` (`bad-config`).
    """
    path = directory / "modules.json" if directory is not None else None
    if path is None or not path.is_file():
        return ()
    kinds = [
        str(row.get("type", "")).rpartition(".")[2] if isinstance(row, dict) else ""
        for row in _read(path, list)
    ]
    return tuple(kind for kind in kinds if kind not in _APPLIED)


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_config(path, str(error)) from error
    if not isinstance(found, kind):
        raise _bad_config(path, f"it holds no {kind.__name__}")
    return found


def _bad_config(path: Path, cause: str) -> VllmcError:
    return VllmcError(
        "bad-config",
        f"{path} is not as sentence-transformers writes it",
        context={"cause": cause},
        hint=f"--pooling {'|'.join(POOLINGS)} reads no file",
    )
