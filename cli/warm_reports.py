"""The files that `warm` writes for CI beside its output, and their options. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vllmc.cli.findings import find, github, write_code_quality
from vllmc.cli.junit import write_junit
from vllmc.cli.output import Output
from vllmc.cli.paths import expanded
from vllmc.cli.prewarm import Result, told_rows
from vllmc.cli.settings import Settings
from vllmc.cli.side_files import check_writable
from vllmc.cli.summary import write_summary
from vllmc.core.errors import VllmcError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFlags:
    """Which files to write."""

    summary: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="$GITHUB_STEP_SUMMARY when set",
            help="Append a Markdown summary to this file.",
        ),
    ] = None
    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write JUnit XML: a test case for each model or entry."),
    ] = None
    code_quality: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write GitLab's code quality report on the entries of --from."
        ),
    ] = None

    def check(self, settings: Settings) -> None:
        """Raises `VllmcError` (`not-writable`) for a file that cannot be written."""
        for path, flag in (
            (self._summary_file(settings), "--summary"),
            (self.junit, "--junit"),
            (self.code_quality, "--code-quality"),
        ):
            if path is not None:
                check_writable(path, flag)

    def write(
        self, settings: Settings, output: Output, results: Sequence[Result], *, started: float
    ) -> int:
        """Writes what was asked for, and to GitHub's log the annotations.

        `started` is when the call began, in unix seconds. A file that cannot be written any more is
        complained of, so that what is known is told elsewhere; returns the exit code for it.
        """
        findings = find(results)
        writers: list[Callable[[], None]] = []
        if (page := self._summary_file(settings)) is not None:
            writers.append(lambda: write_summary(page, told_rows(results)))
        if (cases := self.junit) is not None:
            writers.append(lambda: write_junit(cases, results, started=started))
        if (quality := self.code_quality) is not None:
            writers.append(lambda: write_code_quality(quality, findings, settings.checkout))
        code = 0
        for write in writers:
            try:
                write()
            except VllmcError as error:
                output.complain(error)
                code = error.exit_code
        if settings.on_github:
            output.commands(github(findings, settings.checkout))
        return code

    def _summary_file(self, settings: Settings) -> Path | None:
        given = () if self.summary is None else (self.summary,)
        values = settings.find("summary", given, default=()).values
        return expanded(Path(values[0])) if values else settings.step_summary
