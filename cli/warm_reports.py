"""The files that `warm` writes for CI beside its output, and their options. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from vllmc.cli.findings import find, github, write_code_quality
from vllmc.cli.junit import write_junit
from vllmc.cli.output import Output
from vllmc.cli.prewarm import Result
from vllmc.cli.settings import Settings
from vllmc.cli.summary import write_summary


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

    def write(
        self, settings: Settings, output: Output, results: Sequence[Result], *, started: float
    ) -> None:
        """Writes what was asked for, and to GitHub's log the annotations.

        `started` is when the call began, in unix seconds. Raises `VllmcError` (`not-writable`).
        """
        if (page := self._summary_file(settings)) is not None:
            write_summary(page, [result.row for result in results])
        if self.junit is not None:
            write_junit(self.junit, results, started=started)
        findings = find(results)
        if self.code_quality is not None:
            write_code_quality(self.code_quality, findings, settings.checkout)
        if settings.on_github:
            output.commands(github(findings, settings.checkout))

    def _summary_file(self, settings: Settings) -> Path | None:
        given = () if self.summary is None else (self.summary,)
        values = settings.find("summary", given, default=()).values
        return Path(values[0]).expanduser() if values else settings.step_summary
