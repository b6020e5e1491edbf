"""`vllmc run`: generates with the compiled program and reports what compiled again, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllmc.cli import job as jobs
from vllmc.cli import report
from vllmc.cli.options import CommonFlags, CompileFlags, choice, command, compile_request
from vllmc.core.cache.store import Store
from vllmc.core.errors import CheckFailed, UsageError, VllmcError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vllmc.core.models.model import ModelInfo
    from vllmc.core.runtime.engine import Output as Generated
    from vllmc.core.runtime.workload import WorkloadResult

DEFAULT_PROMPT = "1,2,3"
GUARDS = ("check", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFlags:
    """What to generate."""

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
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="How many tokens to generate for each prompt.")
    ] = 16
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Run the prompts, repeated or cut to N; repeatable, each in turn."
        ),
    ] = None
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 always takes the most probable token.")
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Sample from the fewest tokens that hold this much."),
    ] = 1.0
    seed: Annotated[int, typer.Option(metavar="N", help="Makes sampling repeatable.")] = 0
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Report each token's log-probability and the K most probable."
        ),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate on after a stop token.")
    ] = False


@command
def run(
    compilation: CompileFlags,
    generation: GenerationFlags,
    common: CommonFlags,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default="tiny-llama",
            help="module:attribute, a directory, a preset or a hub id.",
        ),
    ] = None,
    fail_on_recompile: Annotated[
        bool,
        typer.Option(
            "--fail-on-recompile",
            help="Exit 3 when something compiled again, or would have; implies --guards check.",
        ),
    ] = False,
    fail_on_miss: Annotated[
        bool,
        typer.Option("--fail-on-miss", help="Exit 3 rather than compile, 4 on what is corrupt."),
    ] = False,
    guards: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(GUARDS),
            show_default="drop",
            help="Whether each step is held against what capture assumed.",
        ),
    ] = None,
) -> int:
    """Generate with the compiled program, and report each recompile with cause and fix.

    Weights come from the model's directory, else they are random, always the same. Prompts longer
    than the last compile range are computed in parts. --fail-on-miss is decided before anything
    is compiled.

    A program runs without guards. With --guards check, what capture assumed is evaluated before
    each step: guards on sizes that do not follow from the compile ranges, and, of a model that
    Python code makes (module:attribute), the Python values that it read. What fails is reported
    among the recompiles, with dropped set, and the program runs on as it was compiled: what it
    gives may then be wrong. A token count in no compile range, a tensor with another dtype or
    layout than compiled for, and sizes that differ where they are one, are errors in any case.

    With --json: model, key, outputs (prompt, token_ids, text or null, finish_reason: length or
    stop; with --logprobs logprobs: token_id, logprob, rank and top for each token), counts (hit,
    dup, compiled units), recompiles (frame, class, guard, subject, expected, observed, count,
    limit_hit, cost_seconds, pattern, dropped, fix; as recompiles has them), seconds (load,
    first_token, total), tokens_per_second (prefill, decode). With several --batch-size, outputs are
    those of the last.
    """
    settings = common.settings()
    output = common.output("run")
    given = settings.find("guards", () if guards is None else (guards,), default=("drop",))
    checked = choice("guards", given, GUARDS) == "check" or fail_on_recompile
    job = jobs.make(settings, compile_request(settings, compilation, model))

    import torch

    from vllmc.core.graph.layout import Layout
    from vllmc.core.obtain import Policy
    from vllmc.core.pipeline import obtain_program, open_program
    from vllmc.core.runtime.engine import check_prompts
    from vllmc.core.runtime.guards import GuardCheck
    from vllmc.core.runtime.memory import require_memory
    from vllmc.core.runtime.sampler import SamplingParams
    from vllmc.core.runtime.workload import Limits, run_workload

    spec, info = job.spec, job.model.info
    params = SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=generation.seed,
        logprobs=generation.logprobs,
        ignore_eos=generation.ignore_eos,
        stop_token_ids=info.stop_token_ids,
    )
    tokenizer = _tokenizer(info)
    names, prompts = _prompts(generation, tokenizer)
    # Before anything is compiled for what cannot run.
    vocab_size = _vocabulary(info, job.model.name)
    check_prompts(
        prompts, params.max_new_tokens, vocab_size=vocab_size, max_position=info.max_position
    )
    for size in generation.batch_size or []:
        if size < 1:
            raise UsageError("bad-value", f"a batch of {size} prompts", hint="--batch-size 1")
    with output.progress() as observer:
        ready = obtain_program(
            job, Store(settings.cache_dir), observer, policy=Policy(may_compile=not fail_on_miss)
        )
        layout = Layout.from_json(ready.record.program)
        require_memory(layout, spec.device)
        observer.stage("load")
        started = time.perf_counter()
        entry = job.model.build(
            "real", device=spec.device, dtype=spec.dtype, layer_names=spec.layer_names, seed=0
        )
        check = GuardCheck(layout, ready.record.guarded, entry) if checked else None
        program = open_program(ready, entry, check)
        load = time.perf_counter() - started
    result = run_workload(
        program,
        prompts,
        params,
        Limits(
            vocab_size=vocab_size,
            max_position=info.max_position,
            dtype=getattr(torch, spec.dtype),
            device=spec.device,
        ),
        batch_sizes=generation.batch_size or [],
    )
    recompiles = result.recompiles + (check.broken if check is not None else ())
    row = {
        "model": job.model.name,
        "key": job.key,
        "outputs": [
            _output_row(names[index % len(names)], generated, tokenizer)
            for index, generated in enumerate(result.outputs)
        ],
        "counts": {name: ready.count(name) for name in ("hit", "dup", "compiled")},
        "recompiles": [recompile.to_json() for recompile in recompiles],
        **_speed(result, load),
    }
    output.data(row, lambda: report.run(row))
    return CheckFailed.exit_code if fail_on_recompile and recompiles else 0


def _vocabulary(info: ModelInfo, model: str) -> int:
    if info.vocab_size is None:
        raise VllmcError(
            "unknown-vocabulary",
            f"{model} does not say how many tokens its vocabulary has",
            hint="give it a config with a vocab_size",
        )
    return info.vocab_size


def _speed(result: WorkloadResult, load: float) -> dict[str, Any]:
    timings = result.timings

    def rate(tokens: int, seconds: float) -> float:
        return round(tokens / seconds, 2) if seconds else 0.0

    return {
        "seconds": {
            "load": round(load, 4),
            "first_token": round(timings[0].first_token_seconds, 4),
            "total": round(result.seconds, 4),
        },
        "tokens_per_second": {
            "prefill": rate(
                sum(t.prefill_tokens for t in timings), sum(t.prefill_seconds for t in timings)
            ),
            "decode": rate(
                sum(t.decode_tokens for t in timings), sum(t.decode_seconds for t in timings)
            ),
        },
    }


def _output_row(
    prompt: str, generated: Generated, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    ids = list(generated.token_ids)
    row: dict[str, Any] = {
        "prompt": prompt,
        "token_ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else None,
        "finish_reason": generated.finish_reason,
    }
    if generated.logprobs is not None:
        row["logprobs"] = [
            {
                "token_id": token.token_id,
                "logprob": token.logprob,
                "rank": token.rank,
                "top": [{"token_id": i, "logprob": value} for i, value in token.top],
            }
            for token in generated.logprobs
        ]
    return row


def _tokenizer(info: ModelInfo) -> PreTrainedTokenizerBase | None:
    directory = info.tokenizer
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


def _prompts(
    generation: GenerationFlags, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[str], list[list[int]]]:
    """What each prompt is called in the output, and its token ids."""
    texts = generation.prompt or []
    if texts and tokenizer is None:
        raise VllmcError(
            "no-tokenizer",
            "the model has no tokenizer for the text of --prompt",
            hint="give prompts as token ids: --prompt-ids 1,2,3",
        )
    names, prompts = list(texts), [list(tokenizer(t).input_ids) for t in texts if tokenizer]
    for text in generation.prompt_ids or ([] if texts else [DEFAULT_PROMPT]):
        names.append(text)
        prompts.append(_ids(text))
    return names, prompts


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            "bad-value",
            f"'{text}' is no list of token ids",
            hint="separate them by commas: --prompt-ids 1,2,3",
        ) from None
