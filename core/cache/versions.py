"""Which torch is installed here. Imports no torch."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from vllmc.core.errors import VllmcError

_VERSION = re.compile(r"^__version__ = ['\"]([^'\"]+)['\"]", re.MULTILINE)


def installed_torch() -> str:
    """What `torch.__version__` is, without importing it. Raises `VllmcError` (`no-torch`)."""
    # Not the distribution's version: that of PyPI's wheels lacks `+cu130`.
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name("version.py")
        if path.is_file() and (found := _VERSION.search(path.read_text(encoding="utf-8"))):
            return found[1]
    raise VllmcError(
        "no-torch",
        "no torch is installed in this environment",
        hint="run vllmc in the environment whose programs are to stay",
    )
