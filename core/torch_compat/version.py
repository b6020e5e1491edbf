"""Which torch vllmc works with. Imports no torch.

The only place that compares versions of torch: `vllmc.core.torch_compat.minors` is chosen by it.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal, TypeAlias

from vllmc.core.errors import VllmcError

Minor: TypeAlias = tuple[int, int]
Standing: TypeAlias = Literal["too-old", "known", "newer"]

OLDEST: Final[Minor] = (2, 11)
NEWEST: Final[Minor] = (2, 15)
LACKING: Final = (
    "dimensions that share one unbacked size (shape_id), values of ops that are inputs of the "
    "captured graph (hoisted opaque values), and capture of one full graph"
)
"""What torch had not before `OLDEST`, and vllmc cannot do without."""

_WRITTEN: Final = re.compile(r"^__version__ = ['\"]([^'\"]+)['\"]", re.MULTILINE)


def spelled(minor: Minor) -> str:
    """`2.11` of `(2, 11)`."""
    return f"{minor[0]}.{minor[1]}"


def install_known() -> str:
    """The command that installs the newest torch that vllmc knows."""
    return f"pip install 'torch<={spelled(NEWEST)}.99'"


def minor_of(version: str) -> Minor:
    """`(2, 13)` of `2.13.0+cpu`. Raises `VllmcError` (`torch-unreadable`) for other text."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise VllmcError(
            "torch-unreadable",
            f"'{version}' is not a version of torch",
            hint=f"install torch {spelled(OLDEST)} to {spelled(NEWEST)}",
        )
    return int(found[1]), int(found[2])


def standing(version: str) -> Standing:
    """Whether vllmc was tested with this minor version of torch, or is older or newer than it."""
    minor = minor_of(version)
    if minor < OLDEST:
        return "too-old"
    return "newer" if minor > NEWEST else "known"


def refuse_older(version: str) -> None:
    """Raises `VllmcError` (`torch-too-old`) for a torch that lacks what vllmc needs."""
    if standing(version) == "too-old":
        raise VllmcError(
            "torch-too-old",
            f"torch {version} is too old for vllmc, which needs {spelled(OLDEST)} or later",
            context={"torch": version, "lacking": LACKING},
            hint=f"pip install 'torch>={spelled(OLDEST)}' --upgrade",
        )


def installed_torch() -> str:
    """What `torch.__version__` is, without importing it. Raises `VllmcError` (`no-torch`)."""
    # Not the distribution's version: that of PyPI's wheels lacks `+cu130`.
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name("version.py")
        if path.is_file() and (found := _WRITTEN.search(path.read_text(encoding="utf-8"))):
            return found[1]
    raise VllmcError(
        "no-torch",
        "no torch is installed in this environment",
        hint="pip install torch, or run vllmc in the environment that has it",
    )
