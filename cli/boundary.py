"""Errors that nobody foresaw, as a person is told of them. Imports no torch."""

from __future__ import annotations

import traceback
from pathlib import Path

from vllmc.core.errors import VllmcError
from vllmc.core.torch_compat.version import install_known, installed_torch, standing


def unforeseen(error: BaseException) -> VllmcError:
    """The error to print for an exception that no part of vllmc made into one."""
    if isinstance(error, OSError):
        return VllmcError("os-error", str(error), hint="check the path, its permissions and space")
    newer = _newer_torch()
    return VllmcError(
        "internal",
        f"{type(error).__name__}: {error}",
        context={"at": _place(error)} | ({"torch": newer} if newer else {}),
        hint=f"torch {newer} is newer than vllmc knows: try {install_known()}, or a newer vllmc"
        if newer
        else "unless the model's own code is at fault, this is a fault in vllmc: report it with "
        "the traceback that -vv shows",
    )


def _newer_torch() -> str | None:
    """The version of the torch that is installed, if vllmc was not tested with it."""
    try:
        version = installed_torch()
        return version if standing(version) == "newer" else None
    except VllmcError:
        return None


def _place(error: BaseException) -> str:
    """Where an exception was raised, as `file.py:12 in function`."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}"
