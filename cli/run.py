"""`vllmc run`: runs the compiled program and reports what compiled again, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllmc.cli import job as jobs
from vllmc.cli import report
from vllmc.cli.calibration import Calibration, CalibrationFlags
from vllmc.cli.embed import EmbeddingFlags, embed
from vllmc.cli.graphs import GraphFlags, graphs_row, tell_of_graphs
from vllmc.cli.option_table import choice
from vllmc.cli.options import (
    CommonFlags,
    CompileFlags,
    RemoteFlags,
    WorkerFlags,
    command,
    compile_request,
)
from vllmc.cli.prompts import PromptFlags, Prompts, load_tokenizer
from vllmc.core.errors import CheckFailed, UsageError, VllmcError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from vllmc.core.cache.record import ProgramRecord
    from vllmc.core.events import Observer
    from vllmc.core.job import Job
    from vllmc.core.pipeline import Ready
    from vllmc.core.runtime.engine import Output as Generated
    from vllmc.core.runtime.guards import GuardCheck
    from vllmc.core.runtime.program import Program
    from vllmc.core.runtime.sampler import SamplingParams
    from vllmc.core.runtime.workload import Limits, WorkloadResult

DEFAULT_NEW_TOKENS = 16
GUARDS = ("check", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFlags:
    """What to generate."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=str(DEFAULT_NEW_TOKENS),
            help="How many tokens to generate for each prompt.",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T", show_default="0.0", help="0 always takes the most probable token."
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            show_default="1.0",
            help="Sample from the fewest tokens that hold this much.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", show_default="0", help="Makes sampling repeatable."),
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Report each token's log-probability and the K most probable."
        ),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate on after a stop token.")
    ] = False

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that were given, as they are written."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        given = [name for name, value in values.items() if value is not None and value is not False]
        return tuple(f"--{name.replace('_', '-')}" for name in given)

    def params(self, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        """How to sample. Raises what `SamplingParams` raises."""
        from vllmc.core.runtime.sampler import SamplingParams

        return SamplingParams(
            max_new_tokens=(
                DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
            ),
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed or 0,
            logprobs=self.logprobs,
            ignore_eos=self.ignore_eos,
            stop_token_ids=stop_token_ids,
        )


@command
def run(
    compilation: CompileFlags,
    prompting: PromptFlags,
    generation: GenerationFlags,
    embedding: EmbeddingFlags,
    calibrating: CalibrationFlags,
    graphs: GraphFlags,
    workers: WorkerFlags,
    remotes: RemoteFlags,
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
    """Generate or embed with the compiled program, and report each recompile with cause and fix.

    Weights come from the model's directory, else they are random, always the same; files that lack
    a tensor of the model are refused. Prompts longer than the last compile range are computed in
    parts; an encoder (--embed) runs them whole, and its last compile range has no end.
    --fail-on-miss is decided before anything is compiled, and after --remote was asked for what the
    cache lacks.

    With --quantize fp8-static the scales of activations are those of the checkpoint, where it was
    quantised so, else they come from a run of the --calibrate prompts before the model is
    quantised. They change no key: what was compiled under others is found again.

    A program runs without guards. With --guards check, what capture assumed is evaluated before
    each step: guards on sizes that do not follow from the compile ranges, and, of a model that
    Python code makes (module:attribute), the Python values that it read. What fails is reported
    among the recompiles, with dropped set, and the program runs on as it was compiled: what it
    gives may then be wrong. A token count in no compile range, a tensor with another dtype or
    layout than compiled for, and sizes that differ where they are one, are errors in any case.

    With --cuda-graphs piecewise, on a GPU, a decode step of one of the --cuda-graph-size numbers of
    sequences replays a CUDA graph of each piece once that number has come up a few times; other
    steps run without. -v says what graphs took, and which pieces run without one, and why.

    With --json: model, key, outputs (prompt, token_ids, text or null, finish_reason: length or
    stop; with --logprobs logprobs: token_id, logprob, rank and top for each token), counts (hit,
    dup, compiled units), cuda_graphs (null without; sizes, graphs: how many, replayed_steps, bytes,
    plain and failed: the cause by piece), recompiles (frame, class, guard, subject, expected,
    observed, count, limit_hit, cost_seconds, pattern, dropped, fix; as recompiles has them),
    seconds (load, first_token, total), tokens_per_second (prefill, decode). With several
    --batch-size, outputs are those of the last. With --embed, in place of outputs: pooling and
    embeddings (prompt, tokens: how many, embedding); seconds has load and total, and
    tokens_per_second is one number.
    """
    settings = common.settings()
    output = common.output("run")
    embedding.check(generation.given + graphs.given)
    asked = settings.find("guards", () if guards is None else (guards,), default=("drop",))
    checked = choice("guards", asked, GUARDS) == "check" or fail_on_recompile
    job = jobs.make(settings, compile_request(settings, compilation, model))
    if not job.model.runs_in_engine:
        raise _declared(job.label)
    calibrating.check(job.spec)
    sizes = () if embedding.embed else graphs.sizes(settings, job.spec.device, job.factors)

    from vllmc.core.obtain import Policy
    from vllmc.core.pipeline import obtain_program
    from vllmc.core.runtime.engine import check_prompts

    info = job.model.info
    embedding.check_model(job.model.name, info)
    pooling = embedding.pooling_of(info, output) if embedding.embed else None
    params = generation.params(info.stop_token_ids)
    tokenizer = load_tokenizer(info.directory)
    prompts = prompting.read(tokenizer)
    limits = _limits(job)
    # Before anything is compiled for what cannot run.
    check_prompts(
        prompts.ids,
        params.max_new_tokens if pooling is None else 0,
        vocab_size=limits.vocab_size,
        max_position=limits.max_position,
    )
    calibration = Calibration(prompts=calibrating.read(tokenizer), limits=limits)
    check_prompts(
        calibration.prompts,
        1 if pooling is None else 0,
        vocab_size=limits.vocab_size,
        max_position=limits.max_position,
        purpose=" to calibrate on",
    )
    with output.progress() as observer:
        entry = _Entry(job, calibration, observer)
        with workers.pool(settings, [job.spec]) as pool:
            ready = obtain_program(
                job,
                settings.store(),
                observer,
                policy=Policy(may_compile=not fail_on_miss),
                pool=pool,
                meanwhile=entry.build,
                remote=remotes.find(settings),
            )
        program, check, load = _load(entry, ready, checked=checked, graph_sizes=sizes)
    if pooling is None:
        done = _generate(program, prompts, params, limits, tokenizer)
    else:
        done = embed(job, program, prompts, pooling, embedding.embed_output)
    broken = check.broken if check is not None else ()
    recorded = None if program.graphs is None else program.graphs.report()
    tell_of_graphs(output, recorded)
    row = {
        "model": job.model.name,
        "key": job.key,
        "counts": {name: ready.count(name) for name in ("hit", "dup", "compiled")},
        **done,
        "cuda_graphs": graphs_row(recorded),
        "recompiles": [*done["recompiles"], *(guard.to_json() for guard in broken)],
        "seconds": {"load": round(load, 4), **done["seconds"]},
    }
    output.data(row, lambda: report.run(row) if pooling is None else report.embeddings(row))
    return CheckFailed.exit_code if fail_on_recompile and row["recompiles"] else 0


def _declared(name: str) -> UsageError:
    return UsageError(
        "declared-class",
        f"{name} declares its own arguments, and run brings token ids to a language model",
        hint="call it from a program of your own, which takes what vllmc warm stored from the "
        "cache; see docs/declare.md",
    )


def _limits(job: Job) -> Limits:
    import torch

    from vllmc.core.runtime.workload import Limits

    info = job.model.info
    if info.vocab_size is None:
        raise VllmcError(
            "unknown-vocabulary",
            f"{job.model.name} does not say how many tokens its vocabulary has",
            hint="give it a config with a vocab_size",
        )
    return Limits(
        vocab_size=info.vocab_size,
        max_position=info.max_position,
        dtype=getattr(torch, job.spec.dtype),
        device=job.spec.device,
    )


class _Entry:
    """The model with its weights, built once; `seconds` is what that took."""

    def __init__(self, job: Job, calibration: Calibration, observer: Observer) -> None:
        self.device = job.spec.device
        self._job = job
        self._calibration = calibration
        self._observer = observer
        self._entry: torch.nn.Module | None = None
        self.seconds = 0.0

    def build(self, record: ProgramRecord) -> torch.nn.Module:
        """The entry module.

        Raises what `build_model` does, what calibrating does, and `not-enough-memory`.
        """
        import torch

        from vllmc.core.graph.layout import Layout
        from vllmc.core.models.built import build_model
        from vllmc.core.runtime.memory import require_memory

        if self._entry is None:
            self._observer.stage("load")
            job = self._job
            layout = Layout.from_json(record.program)
            require_memory(layout, job.spec.device, getattr(torch, job.spec.dtype))
            started = time.perf_counter()
            calibrate = self._calibration.of(job, layout, self._observer)
            self._entry = build_model(job.model, job.spec, "real", calibrate)
            self.seconds = time.perf_counter() - started
        return self._entry


def _load(
    entry: _Entry, ready: Ready, *, checked: bool, graph_sizes: tuple[int, ...]
) -> tuple[Program, GuardCheck | None, float]:
    """The program with the model's weights, its guards if `checked`, and how long that took."""
    from vllmc.core.graph.layout import Layout
    from vllmc.core.pipeline import open_program
    from vllmc.core.runtime.cuda_graphs import recorder_for
    from vllmc.core.runtime.guards import GuardCheck

    module = entry.build(ready.record)
    started = time.perf_counter()
    layout = Layout.from_json(ready.record.program)
    check = GuardCheck(layout, ready.record.guarded, module) if checked else None
    recorder = recorder_for(entry.device) if graph_sizes else None
    program = open_program(ready, module, check, recorder=recorder, graph_sizes=graph_sizes)
    return program, check, entry.seconds + time.perf_counter() - started


def _generate(
    program: Program,
    prompts: Prompts,
    params: SamplingParams,
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """What the JSON says of generating."""
    from vllmc.core.runtime.workload import run_workload

    result = run_workload(program, prompts.ids, params, limits, batch_sizes=prompts.batch_sizes)
    return {
        "outputs": [
            _output_row(prompts.name(index), generated, tokenizer)
            for index, generated in enumerate(result.outputs)
        ],
        "recompiles": [recompile.to_json() for recompile in result.recompiles],
        **_speed(result),
    }


def _speed(result: WorkloadResult) -> dict[str, Any]:
    timings = result.timings

    def rate(tokens: int, seconds: float) -> float:
        return round(tokens / seconds, 2) if seconds else 0.0

    return {
        "seconds": {
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
