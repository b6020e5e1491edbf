"""`vllmc run --embed`: what an encoder makes of prompts, printed or written to a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllmc.cli.option_table import Setting, choice
from vllmc.cli.output import Output
from vllmc.cli.side_files import writing
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.models.pooling import (
    DEFAULT_POOLING,
    POOLINGS,
    Pooling,
    steps_left_out,
    stored_pooling,
)

if TYPE_CHECKING:
    import torch

    from vllmc.cli.prompts import Prompts
    from vllmc.core.job import Job
    from vllmc.core.models.model import ModelInfo
    from vllmc.core.runtime.program import Program

_SUFFIXES = (".safetensors", ".npy")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingFlags:
    """Whether to embed, how, and where to."""

    embed: Annotated[
        bool,
        typer.Option("--embed", help="Embed the prompts: what encoders do."),
    ] = False
    pooling: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(POOLINGS),
            show_default="1_Pooling/config.json in the model's directory, else mean",
            help="The embedding is the first token's hidden state, the mean of all, or the last's.",
        ),
    ] = None
    embed_output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the embeddings to a .safetensors or .npy file."),
    ] = None

    def check(self, generating: Iterable[str]) -> None:
        """Raises `UsageError` for flags that mean nothing together; `generating` are those given.

        They are the flags that only generating takes.
        """
        if self.embed and (given := [*generating]):
            raise UsageError(
                "bad-value",
                f"{' and '.join(given)} with --embed, which generates nothing",
                hint="leave one out",
            )
        if not self.embed and (self.pooling is not None or self.embed_output is not None):
            name = "--pooling" if self.pooling is not None else "--embed-output"
            raise UsageError("bad-value", f"{name} without --embed", hint="add --embed")
        if self.pooling is not None:
            self._asked()
        if self.embed_output is not None and self.embed_output.suffix not in _SUFFIXES:
            raise UsageError(
                "bad-value",
                f"{self.embed_output} is neither a .safetensors nor a .npy file",
                hint="give --embed-output a name that ends in one of them",
            )

    def check_model(self, name: str, info: ModelInfo) -> None:
        """Raises `UsageError` where an encoder is to generate, or another model to embed."""
        if self.embed and info.encoder is None:
            raise UsageError(
                "not-an-encoder",
                f"{name} is no encoder, and --embed is for encoders",
                hint="leave --embed out to generate text; docs/models.md lists the encoders",
            )
        if not self.embed and info.encoder is not None:
            raise UsageError(
                "is-an-encoder",
                f"{name} is an encoder, which generates no text",
                hint="--embed prints its embeddings",
            )

    def pooling_of(self, info: ModelInfo, output: Output) -> Pooling:
        """The pooling that was asked for, or else the model's own.

        Warns of what the model's own embeddings go through besides. Raises what `stored_pooling`
        raises.
        """
        if left_out := steps_left_out(info.directory):
            output.warn(
                "steps-left-out",
                f"modules.json also names {', '.join(left_out)}: the embeddings are as pooled",
            )
        if self.pooling is not None:
            return self._asked()
        return stored_pooling(info.directory) or DEFAULT_POOLING

    def _asked(self) -> Pooling:
        assert self.pooling is not None
        return choice("pooling", Setting(values=(self.pooling,), origin="flag"), POOLINGS)


def embed(
    job: Job, program: Program, prompts: Prompts, pooling: Pooling, file: Path | None
) -> dict[str, Any]:
    """Embeds the prompts, into `file` too if there is one, and returns what the JSON says of it.

    Raises `VllmcError`: `not-finite`, and what `write_embeddings` raises.
    """
    from vllmc.core.runtime.embeddings import Embedder, run_embeddings

    encoder = job.model.info.encoder
    assert encoder is not None
    embedder = Embedder(step=program, encoder=encoder, pooling=pooling, device=job.spec.device)
    result = run_embeddings(embedder, prompts.ids, batch_sizes=prompts.batch_sizes)
    if not result.embeddings.isfinite().all():
        raise VllmcError(
            "not-finite",
            "an embedding holds infinities or NaN",
            hint="try --dtype float32, and check the model's weights",
        )
    if file is not None:
        write_embeddings(file, result.embeddings)
    return {
        "pooling": pooling,
        "embeddings": [
            {
                "prompt": prompts.name(index),
                "tokens": prompts.tokens(index),
                "embedding": embedding.tolist(),
            }
            for index, embedding in enumerate(result.embeddings)
        ],
        "recompiles": [recompile.to_json() for recompile in result.recompiles],
        "seconds": {"total": round(result.seconds, 4)},
        "tokens_per_second": round(result.tokens / result.seconds, 2),
    }


def write_embeddings(path: Path, embeddings: torch.Tensor) -> None:
    """Writes embeddings `[prompts, H]` as the file's ending says: safetensors or NumPy.

    In a safetensors file they are the tensor `embeddings`. Raises `VllmcError` (`not-writable`).
    """
    with writing(path, "--embed-output"), path.open("wb") as file:
        if path.suffix == ".npy":
            import numpy

            numpy.save(file, embeddings.numpy())
        else:
            import safetensors.torch

            file.write(safetensors.torch.save({"embeddings": embeddings}))
