"""The prompts of `vllmc run`, as text or as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllmc.core.errors import UsageError, VllmcError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_PROMPT = "1,2,3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts as token ids, and what each is called in the output.

    A batch size above their number repeats them, in order.
    """

    names: tuple[str, ...]
    ids: tuple[Sequence[int], ...]
    batch_sizes: tuple[int, ...]

    def name(self, index: int) -> str:
        """What the prompt number `index` of a batch is called."""
        return self.names[index % len(self.names)]

    def tokens(self, index: int) -> int:
        """How many tokens the prompt number `index` of a batch has."""
        return len(self.ids[index % len(self.ids)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFlags:
    """What to run."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt, for the model's tokenizer; repeatable."),
    ] = None
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IDS",
            show_default=DEFAULT_PROMPT,
            help="A prompt as token ids, separated by commas; repeatable.",
        ),
    ] = None
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Run the prompts, repeated or cut to N; repeatable, each in turn."
        ),
    ] = None

    def read(self, tokenizer: PreTrainedTokenizerBase | None) -> Prompts:
        """The prompts, texts first. Raises `UsageError` (`bad-value`), `VllmcError`."""
        for size in self.batch_size or []:
            if size < 1:
                raise UsageError("bad-value", f"a batch of {size} prompts", hint="--batch-size 1")
        texts = self.prompt or []
        numbers = self.prompt_ids or ([] if texts else [DEFAULT_PROMPT])
        return Prompts(
            names=(*texts, *numbers),
            ids=tokenized(texts, numbers, tokenizer, "--prompt"),
            batch_sizes=tuple(self.batch_size or ()),
        )


def tokenized(
    texts: Sequence[str],
    numbers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    flag: str,
) -> tuple[Sequence[int], ...]:
    """The token ids of `texts`, then those written in `numbers`; `flag` takes the texts.

    Raises `UsageError` (`bad-value`), `VllmcError` (`no-tokenizer`).
    """
    if texts and tokenizer is None:
        raise VllmcError(
            "no-tokenizer",
            f"the model has no tokenizer for the text of {flag}",
            hint=f"give prompts as token ids: {flag}-ids 1,2,3",
        )
    return (
        *(list(tokenizer(text).input_ids) for text in texts if tokenizer),
        *(_ids(text, flag) for text in numbers),
    )


def load_tokenizer(directory: Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's directory, if any. Raises `VllmcError` (`bad-tokenizer`)."""
    if directory is None or not any(directory.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise VllmcError(
            "bad-tokenizer",
            f"the tokenizer in {directory} cannot be loaded",
            context={"cause": str(error).splitlines()[0]},
            hint="give prompts as token ids: --prompt-ids 1,2,3",
        ) from error
    return tokenizer


def _ids(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            "bad-value",
            f"'{text}' is no list of token ids",
            hint=f"separate them by commas: {flag}-ids 1,2,3",
        ) from None
