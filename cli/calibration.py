"""What `vllmc run` takes fixed scales of activations from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllmc.cli.prompts import tokenized
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.spec import CompileSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vllmc.core.events import Observer
    from vllmc.core.graph.layout import Layout
    from vllmc.core.job import Job
    from vllmc.core.models.quantized import Calibrate
    from vllmc.core.runtime.workload import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFlags:
    """The prompts to calibrate on."""

    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            show_default="the checkpoint's own scales, else random tokens",
            help="A prompt to take the scales of --quantize fp8-static from; repeatable.",
        ),
    ] = None
    calibrate_ids: Annotated[
        list[str] | None,
        typer.Option(metavar="IDS", help="As --calibrate, as token ids; repeatable."),
    ] = None
    calibrate_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="As --calibrate, for each line of a file."),
    ] = None

    def check(self, spec: CompileSpec) -> None:
        """Raises `UsageError` (`bad-value`) for prompts that no scale is taken from."""
        given = (self.calibrate, self.calibrate_ids, self.calibrate_file)
        if spec.quantize != "fp8-static" and any(value is not None for value in given):
            raise UsageError(
                "bad-value",
                "--calibrate without --quantize fp8-static, the one mode with fixed scales",
                hint="add --quantize fp8-static, or leave it out",
            )

    def read(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Sequence[int], ...]:
        """The prompts, none where none were given.

        Raises `UsageError` (`bad-value`), `VllmcError` (`no-tokenizer`, `not-readable`,
        `empty-prompt`).
        """
        texts = [*(self.calibrate or ()), *self._lines()]
        return tokenized(texts, self.calibrate_ids or (), tokenizer, "--calibrate")

    def _lines(self) -> list[str]:
        if self.calibrate_file is None:
            return []
        try:
            text = self.calibrate_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise VllmcError(
                "not-readable",
                f"the prompts in {self.calibrate_file} cannot be read",
                context={"cause": str(error)},
                hint="--calibrate-file takes a text in UTF-8, a prompt in each line",
            ) from error
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise VllmcError(
                "empty-prompt",
                f"{self.calibrate_file} holds no prompts",
                hint="--calibrate-file takes a text in UTF-8, a prompt in each line",
            )
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How the entry of a program is calibrated; without prompts as its model allows."""

    prompts: tuple[Sequence[int], ...]
    limits: Limits

    def of(self, job: Job, layout: Layout, observer: Observer) -> Calibrate | None:
        """What to calibrate with; None where scales are known, or each input has its own.

        Raises what `Model.own_scales` raises.
        """
        if job.spec.quantize != "fp8-static":
            return None
        prompts = self.prompts
        if not prompts:
            if any(scales.input is not None for scales in job.model.own_scales().values()):
                return None
            prompts = self._random(observer)
        from vllmc.core.runtime.calibration import calibrate

        return partial(
            calibrate,
            prompts=prompts,
            attention=layout.attention,
            limits=self.limits,
            encoder=job.model.info.encoder,
        )

    def _random(self, observer: Observer) -> tuple[Sequence[int], ...]:
        from vllmc.core.runtime.calibration import random_prompts

        prompts = random_prompts(self.limits)
        observer.warning(
            "calibrated-on-random-tokens",
            f"the scales of activations are taken from {len(prompts)} prompts of "
            f"{len(prompts[0])} random tokens",
            "--calibrate TEXT takes them from prompts like those that will be run",
        )
        return prompts
