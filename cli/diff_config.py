"""`vllmc diff-config`: the fields in which two configurations differ, and whether they matter."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vllmc.cli import job as jobs
from vllmc.cli import report
from vllmc.cli.options import CommonFlags, CompileFlags, command, compile_request
from vllmc.cli.prove import print_proof
from vllmc.cli.settings import Settings
from vllmc.cli.snapshots import (
    WORDS,
    Comparison,
    Side,
    compare_sides,
    snapshot_side,
    stored_side,
    unknown_side,
)
from vllmc.core.cache.key import Factor
from vllmc.core.cache.store import Store
from vllmc.core.errors import CheckFailed, UsageError, VllmcError
from vllmc.core.models.presets import DEFAULT_PRESET

# Variables that configure torch, Triton and vllmc; `defaults` is without them.
_CONFIGURING = ("TORCH", "TRITON", "INDUCTOR", "AOT_INDUCTOR", "AOTINDUCTOR", "VLLMC_")


# Flags that are not called as their fields are.
_FLAGS = {"option": "-O", "add_pass": "--pass"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What `current` and `defaults` are worked out from; `model` and `proved`, that of
    `--prove`, are None where none was named.
    """

    settings: Settings
    compilation: CompileFlags
    variables: Mapping[str, str]
    model: str | None
    proved: str | None


@command
def diff_config(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="current, defaults, a stored key, a snapshot file, a vLLM cache or log, or a "
            "torch trace.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other side, likewise.")],
    compilation: CompileFlags,
    common: CommonFlags,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A variable of the environment of current; repeatable."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default="the other side's, else that of --prove, else tiny-llama",
            help="Whose factors current and defaults are.",
        ),
    ] = None,
    prove: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compile the pieces of MODEL under both sides, and say what each change changes.",
        ),
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit 3 when a difference affects the key.")
    ] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="List also differences that do not affect the key.")
    ] = False,
) -> int:
    """Name the exact fields in which two configurations, caches or machines differ.

    A snapshot file is what vllmc inspect-key --json prints. The options that shape the
    compilation apply to current; defaults is without them, config file and environment variables.

    A directory of vLLM's torch_compile_cache (with one key) or a log of vLLM's with
    VLLM_LOGGING_LEVEL=DEBUG is compared with another of these, or with a snapshot of one.

    A TORCH_TRACE directory, or one log of it, is compared with another: compilations are matched,
    and the components named in which their keys in torch's caches differ.

    --prove sets up each change that affects the key, alone and all together, compiles the pieces
    of MODEL, and compares the generated code, and the results on random inputs where it differs,
    for token counts that both sides serve. --layers applies to MODEL; all else is as the sides
    have it. What cannot be set here (another torch, another CPU) is listed as such.

    With --json: a and b (kind, name), equal (no difference affects the key), changes (group,
    name: that of a factor, or of the part of its value that differs, as in name.key and name[2];
    before, after, kind: changed, added or removed; class: codegen, surroundings, identity, secret
    or unknown; affects_key, origin_before, origin_after, note, restore), same, the number of
    factors that are, and notes, remarks on what was compared. With --prove also proof: model,
    pieces (how many unique ones side a has, or null), changes (group, name, before, after, code:
    same, differs, unproved, or together for what comes with other changes; units whose code
    differs, of how many, differing: their names; bitwise and max_abs_diff of the results, null
    where unknown; reason), together (the same for all changes that can be made here, and their
    number as changes) and elsewhere (factors that both sides have in common, and not with this
    process).
    """
    settings = common.settings()
    given = _Given(
        settings=settings,
        compilation=compilation,
        variables=_variables(env or []),
        model=model,
        proved=prove,
    )
    foreign = _compare_foreign(a, b)
    if foreign and prove is not None:
        raise UsageError(
            "bad-value",
            "--prove compiles what vllmc would; a cache, log or trace of others does not say it",
            hint="compare snapshots that vllmc inspect-key --json wrote, or stored keys",
        )
    comparison = foreign or _compare_own(a, b, given)
    left, right = comparison.left, comparison.right
    equal = not any(change.affects_key for change in comparison.changes)
    row: dict[str, Any] = {
        "a": {"kind": left.kind, "name": left.name},
        "b": {"kind": right.kind, "name": right.name},
        "equal": equal,
        "changes": [c.to_json() for c in comparison.changes if c.affects_key or show_all],
        "same": comparison.same,
        "notes": [*left.notes, *right.notes, *comparison.notes],
    }
    output = common.output("diff-config")
    if prove is None:
        output.data(row, lambda: report.diff(row))
    else:
        request = compile_request(settings, compilation, prove)
        print_proof(row, (left, right), request, settings, output)
    return CheckFailed.exit_code if exit_code and not equal else 0


def _compare_foreign(a: str, b: str) -> Comparison | None:
    """The comparison of what other systems recorded; None where it is all vllmc's own."""
    if not Path(a).exists() and not Path(b).exists():
        return None
    from vllmc.cli.foreign import compare_recorded

    return compare_recorded(a, b)


def _compare_own(a: str, b: str, given: _Given) -> Comparison:
    store = given.settings.store()
    # Else two records are laid side by side, and neither says what is loaded or compiled.
    to_use = given.proved is not None or a in WORDS or b in WORDS
    known = {text: _known_side(store, text, to_use=to_use) for text in (a, b)}
    models = (given.model, *(side.model for side in known.values() if side), given.proved)
    whose = next((model for model in models if model), DEFAULT_PRESET)
    try:
        left, right = (known[text] or _live_side(text, given, whose) for text in (a, b))
    except VllmcError as error:
        if error.code == "unknown-model" and given.model is None and whose != given.proved:
            error.hint = "--model MODEL says whose factors current and defaults are"
        raise
    return compare_sides(left, right)


def _variables(pairs: list[str]) -> dict[str, str]:
    variables = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(
                "bad-value", f"'{name}' sets no variable", hint="write it as --env NAME=VALUE"
            )
        variables[name] = value
    return variables


def _known_side(store: Store, text: str, *, to_use: bool) -> Side | None:
    """The side `text`, where it is a file or a stored key."""
    if text in WORDS:
        return None
    if Path(text).is_file():
        return snapshot_side(Path(text))
    side = stored_side(store, text, to_use=to_use)
    if side is None:
        raise unknown_side(text)
    return side


def _live_side(text: str, given: _Given, model: str) -> Side:
    if text == "defaults":
        environment = {
            name: value
            for name, value in given.settings.environment.items()
            if not _configures(name)
        }
        words = ["--config", os.devnull]
        if given.proved is not None and given.compilation.layers is not None:
            # They say which model the proof is about, not how it is compiled.
            words += ["--layers", str(given.compilation.layers)]
        return Side(
            kind="defaults",
            name="",
            model=model,
            factors=_elsewhere(given, model, words, environment),
        )
    if given.variables:
        # torch reads variables when it is imported, so others need a process of their own.
        words = _words(given.compilation)
        if given.settings.config is not None:
            words += ["--config", str(given.settings.config.path)]
        environment = {**given.settings.environment, **given.variables}
        factors = _elsewhere(given, model, words, environment)
    else:
        request = compile_request(given.settings, given.compilation, model)
        factors = jobs.make(given.settings, request).factors
    return Side(kind="current", name="", model=model, factors=factors)


def _configures(variable: str) -> bool:
    """Whether a variable may change a factor, so that `defaults` is without it."""
    from vllmc.core.cache.factor_table import CUDA_ENVIRONMENT, ENVIRONMENT

    return (
        variable.startswith(_CONFIGURING) or variable in ENVIRONMENT or variable in CUDA_ENVIRONMENT
    )


def _elsewhere(
    given: _Given, model: str, words: list[str], environment: Mapping[str, str]
) -> tuple[Factor, ...]:
    """The factors that `inspect-key` with the options `words` finds under this environment."""
    program = "from vllmc.cli.app import entry_point; entry_point()"
    places = [word for path in given.settings.cache_dirs for word in ("--cache-dir", str(path))]
    words = [model, *places, *words]
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect-key", "--json", "-q", *words],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        data: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        data = {}
    if (error := data.get("error")) is not None:
        kind = UsageError if done.returncode == UsageError.exit_code else VllmcError
        raise kind(error["code"], error["message"], context=error["context"], hint=error["hint"])
    if "factors" not in data:
        raise VllmcError(
            "inspect-failed",
            "the factors under the other environment could not be worked out",
            context={"exit": done.returncode, "stderr": done.stderr[-500:]},
            hint="run vllmc inspect-key under that environment to see why",
        )
    return tuple(Factor.from_json(row) for row in data["factors"])


def _words(compilation: CompileFlags) -> list[str]:
    """The flags as they were typed."""
    words = []
    for field in dataclasses.fields(compilation):
        flag = _FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")
        given = getattr(compilation, field.name)
        if isinstance(given, bool):
            words.append(flag if given else flag.replace("--", "--no-", 1))
            continue
        for value in [given] if isinstance(given, str) else given or []:
            words += [flag, value]
    return words
