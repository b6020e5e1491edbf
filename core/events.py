"""What a long computation tells whoever watches it. Imports no torch.

The pipeline is handed an `Observer` and reports to it; it never prints.
"""

from __future__ import annotations

import logging
from typing import Literal, Protocol, TypeAlias

UnitOutcome: TypeAlias = Literal["hit", "dup", "compiled"]


class Observer(Protocol):
    """Follows a computation through its stages and compile units.

    Several units may be at work at once; one whose worker died begins a second time.
    All calls come from the thread that runs the pipeline; none may raise but `KeyboardInterrupt`.
    """

    def stage(self, name: str) -> None:
        """A stage of the pipeline begins: `capture`, `split`, `link`, ..."""

    def unit_started(self, name: str, index: int, total: int) -> None:
        """The compile unit `name` (`piece_0 for 1:8192 tokens`) begins; `index` counts from 0."""

    def unit_finished(self, name: str, outcome: UnitOutcome, seconds: float) -> None:
        """The compile unit `name` is done, after `seconds` of wall time of its own."""

    def warning(self, code: str, message: str, hint: str = "") -> None:
        """What a person should know of and went on; `code` is kebab-case, as in `VllmcError`."""

    def remark(self, text: str) -> None:
        """What is worth knowing to who asks for more than warnings."""

    def waiting(self, what: str) -> None:
        """Nothing happens until someone else is done: `process 7 on a-host compiles this model`."""


class SilentObserver:
    """An observer that looks away."""

    def stage(self, name: str) -> None:
        """Ignores the stage."""

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Ignores the unit."""

    def unit_finished(self, name: str, outcome: UnitOutcome, seconds: float) -> None:
        """Ignores the unit."""

    def warning(self, code: str, message: str, hint: str = "") -> None:
        """Ignores the warning."""

    def remark(self, text: str) -> None:
        """Ignores the remark."""

    def waiting(self, what: str) -> None:
        """Ignores the wait."""


class LogObserver:
    """Writes to the logger `vllmc`: warnings as such, what is compiled as information."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("vllmc")

    def stage(self, name: str) -> None:
        """Logs the stage, for who debugs."""
        self._logger.debug("%s", name)

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Logs what begins, for who debugs."""
        self._logger.debug("%s (%d of %d)", name, index + 1, total)

    def unit_finished(self, name: str, outcome: UnitOutcome, seconds: float) -> None:
        """Logs what a unit came to."""
        self._logger.info("%s: %s, %.1f s", name, outcome, seconds)

    def warning(self, code: str, message: str, hint: str = "") -> None:
        """Logs the warning."""
        self._logger.warning("%s: %s%s", code, message, f" ({hint})" if hint else "")

    def remark(self, text: str) -> None:
        """Logs the remark."""
        self._logger.info("%s", text)

    def waiting(self, what: str) -> None:
        """Logs what is waited for."""
        self._logger.info("%s", what)
