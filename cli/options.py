"""The options that commands share, and the compilation that they ask for. Imports no torch.

Options that belong together are a frozen dataclass of annotated fields; a command takes one
parameter per group, and `command` shows Typer the fields in its place. A field that is None was
not given: environment, config file and default decide then (`settings`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from vllmc.cli.option_table import RawOption, Setting, choice, truth
from vllmc.cli.output import Output
from vllmc.cli.settings import Settings, load_settings
from vllmc.core.errors import UsageError
from vllmc.core.models.presets import DEFAULT_PRESET
from vllmc.core.passes import ALL, PASSES, PassChoice
from vllmc.core.spec import (
    ATTENTION_OP,
    CompileRange,
    CompileSpec,
    DynamicShapes,
    ExpertsKind,
    LayerNames,
    Quantization,
    check_ranges,
    unit_ranges,
)

if TYPE_CHECKING:
    from vllmc.core.cache.remote import Remote
    from vllmc.core.workers.pool import WorkerPool

T = TypeVar("T")

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("inductor", "eager")
DEFAULT_RANGE = "1:8192"
_PATIENCE_SECONDS = 15.0
_PULL_SECONDS = 300.0

_PLACES = ("default", "file", "env", "flag")
"""Where a setting may come from, as its origin begins; each beats those before it."""

SHAPING_PANEL = "Options that shape the compilation"
COMMON_PANEL = "Options of every command"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonFlags:
    """What every command takes."""

    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object on stdout.", rich_help_panel=COMMON_PANEL
        ),
    ] = False
    verbose: Annotated[
        int,
        typer.Option(
            "-v",
            count=True,
            metavar="",
            show_default=False,
            help="Say more; -vv also shows the traceback of an error.",
            rich_help_panel=COMMON_PANEL,
        ),
    ] = 0
    quiet: Annotated[
        bool,
        typer.Option("-q", help="Show no progress and no hints.", rich_help_panel=COMMON_PANEL),
    ] = False
    cache_dir: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            show_default="the user's cache directory",
            help="Where the cache lies; repeatable: what follows the first is only read.",
            rich_help_panel=COMMON_PANEL,
        ),
    ] = None
    trust_unsigned: Annotated[
        bool,
        typer.Option(
            "--trust-unsigned",
            help="Use also what other users may have written, unsigned.",
            rich_help_panel=COMMON_PANEL,
        ),
    ] = False
    sign_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Sign the records that are written with this private key.",
            rich_help_panel=COMMON_PANEL,
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="vllmc.toml, or tool.vllmc in pyproject.toml",
            help="A config file.",
            rich_help_panel=COMMON_PANEL,
        ),
    ] = None

    def settings(self) -> Settings:
        """The settings under these flags; raises what `load_settings` raises."""
        return load_settings(
            cache_dir=self.cache_dir or (),
            config=self.config,
            trust_unsigned=self.trust_unsigned,
            sign_key=self.sign_key,
        )

    def output(self, command: str) -> Output:
        """The sink for what `command` (`cache ls`) prints."""
        return Output(command=command, json=self.json, verbosity=-1 if self.quiet else self.verbose)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileFlags:
    """What shapes a compilation, as typed; `compile_request` checks it."""

    device: Annotated[
        str | None,
        typer.Option(
            metavar="auto|cpu|cuda[:N]",
            show_default="auto",
            help="Where to run; auto takes CUDA where there is a GPU.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            show_default="auto",
            help="The type to compute in; auto takes the model config's, else float32.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    compile_range: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A:B",
            show_default=DEFAULT_RANGE,
            help="Token counts, inclusive, that share one compilation; repeatable.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    compile_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            help="A token count with a compilation of its own; repeatable.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    dynamic_shapes: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(get_args(DynamicShapes)),
            show_default="unbacked",
            help="How the token count is traced.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    layer_names: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(get_args(LayerNames)),
            show_default="hoisted",
            help="Whether layer names are inputs of the graph or constants in it.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(get_args(ExpertsKind)),
            show_default="fused",
            help="What mixtures of experts run on: vllmc's op, or Transformers' grouped_mm.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    splitting_op: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="the attention op",
            help="An op to cut the graph at; repeatable.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    split_kv_update: Annotated[
        bool | None,
        typer.Option(
            "--split-kv-update/--no-split-kv-update",
            show_default="no",
            help="Store keys and values in the piece before attention, not in the attention op.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(get_args(Quantization)),
            help="Quantise the model's linears: weights, and what they are given.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-O",
            metavar="KEY=VALUE",
            help="An Inductor option, or functorch.KEY=VALUE; repeatable.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    add_pass: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            metavar="NAME[@A:B]",
            show_default="those of the device",
            help="A pass over the graphs to run, with @A:B only for compile ranges within A:B, all "
            "for every one that --no-pass does not name; repeatable.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    no_pass: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A pass to leave out, all for every one that --pass does not name; repeatable.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Build the model with this many layers.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(BACKENDS),
            show_default="inductor",
            help="What compiles the pieces; eager stores their graphs.",
            rich_help_panel=SHAPING_PANEL,
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFlags:
    """How many processes compile."""

    jobs: Annotated[
        str | None,
        typer.Option(
            "-j",
            "--jobs",
            metavar="N",
            show_default="the processors that may be used; for one range on two of them, 1",
            help="Compile up to N units at once, in processes of their own; 1: in this one.",
        ),
    ] = None

    @contextmanager
    def pool(self, settings: Settings, specs: Iterable[CompileSpec]) -> Iterator[WorkerPool | None]:
        """The workers to compile `specs` with, none started yet; None for this process.

        Raises `UsageError` (`bad-value`).
        """
        from vllmc.core.workers.pool import WorkerPool
        from vllmc.core.workers.processes import usable_processors

        given = () if self.jobs is None else (self.jobs,)
        processors = usable_processors()
        # A decoder has three units for each range. Two workers gain what starting them costs.
        few = processors == 2 and sum(len(unit_ranges(spec)) for spec in specs) == 1
        setting = settings.find("jobs", given, default=("1" if few else str(processors),))
        (jobs,) = counts("jobs", setting)
        if jobs == 1 or sys.platform != "linux":
            yield None
            return
        with WorkerPool(jobs) as pool:
            yield pool


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFlags:
    """Where else to look for what the cache lacks."""

    remote: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Look for a program there (s3://bucket/prefix, https://..., a directory) before "
            "it is compiled.",
        ),
    ] = None

    def find(self, settings: Settings) -> Remote | None:
        """The remote, which is given up sooner than where `cache pull` asks for it."""
        from vllmc.core.cache.remote import Remote

        given = settings.find("remote", () if self.remote is None else (self.remote,), default=())
        if not given.values:
            return None
        return Remote(url=given.value, patience=_PATIENCE_SECONDS, within=_PULL_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRequest:
    """What to compile, checked as far as torch is not needed for it.

    `device` and `dtype` may still be `auto`, and `options` are neither looked up nor typed. The
    order of ranges and sizes means nothing, so they are sorted. `layers` is None where the
    model's own number holds, `quantize` where nothing is quantised. `origins` maps an option's name
    (`compile-range`) to where its value came from, and `pass NAME` that of a pass; each of
    `options` has its own.
    """

    model: str
    layers: int | None
    device: str
    dtype: str
    ranges: tuple[CompileRange, ...]
    sizes: tuple[int, ...]
    dynamic_shapes: DynamicShapes
    layer_names: LayerNames
    experts: ExpertsKind
    splitting_ops: tuple[str, ...]
    split_kv_update: bool
    quantize: Quantization | None
    options: tuple[RawOption, ...]
    added_passes: tuple[str, ...]
    removed_passes: tuple[str, ...]
    backend: str
    origins: Mapping[str, str]


def compile_request(
    settings: Settings, flags: CompileFlags, model: str | None = None
) -> CompileRequest:
    """Merges flags, environment and config file; raises `UsageError` for what cannot be meant."""

    origins: dict[str, str] = {}

    def given(name: str, flag: str | list[str] | None, *default: str) -> Setting:
        flags = [flag] if isinstance(flag, str) else flag or ()
        setting = settings.find(name, flags, default=default)
        origins[name] = setting.origin
        return setting

    ranges = given("compile-range", flags.compile_range, DEFAULT_RANGE)
    ops = given("splitting-op", flags.splitting_op, ATTENTION_OP)
    layers = counts("layers", given("layers", flags.layers))
    sizes = counts("compile-size", given("compile-size", flags.compile_size))
    shapes = given("dynamic-shapes", flags.dynamic_shapes, "unbacked")
    names = given("layer-names", flags.layer_names, "hoisted")
    removed, added = _passes(
        given("no-pass", flags.no_pass), given("pass", flags.add_pass), origins
    )
    experts = given("experts", flags.experts, "fused")
    split = None if flags.split_kv_update is None else str(flags.split_kv_update).lower()
    modes = given("quantize", flags.quantize)
    request = CompileRequest(
        model=model or DEFAULT_PRESET,
        layers=layers[0] if layers else None,
        device=_device(given("device", flags.device, "auto")),
        dtype=choice("dtype", given("dtype", flags.dtype, "auto"), DTYPES),
        ranges=tuple(sorted(_located(ranges, CompileRange.parse))),
        sizes=tuple(sorted(set(sizes))),
        dynamic_shapes=choice("dynamic-shapes", shapes, get_args(DynamicShapes)),
        layer_names=choice("layer-names", names, get_args(LayerNames)),
        experts=choice("experts", experts, get_args(ExpertsKind)),
        splitting_ops=tuple(dict.fromkeys(_located(ops, _op_name))),
        split_kv_update=truth("split-kv-update", given("split-kv-update", split, "false")),
        quantize=choice("quantize", modes, get_args(Quantization)) if modes.values else None,
        options=_merge(settings.raw_options, flags.option or ()),
        added_passes=added,
        removed_passes=removed,
        backend=choice("backend", given("backend", flags.backend, "inductor"), BACKENDS),
        origins=origins,
    )
    check_ranges(request.ranges, request.sizes)
    return request


def _device(setting: Setting) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", setting.value):
        raise UsageError(
            "bad-value",
            f"'{setting.value}' is no device that vllmc can compile for",
            context={"origin": setting.origin},
            hint="--device takes auto, cpu, cuda or cuda:N",
        )
    return setting.value


def counts(name: str, setting: Setting) -> tuple[int, ...]:
    """The setting's numbers, each at least 1; raises `UsageError` (`bad-value`)."""
    for text in setting.values:
        if not re.fullmatch(r"\s*\d+\s*", text) or int(text) < 1:
            raise UsageError(
                "bad-value",
                f"'{text}' is no value for {name}: it takes a number, at least 1",
                context={"origin": setting.origin},
                hint=f"for example --{name} 4",
            )
    return tuple(int(text) for text in setting.values)


def _passes(
    no_pass: Setting, to_pass: Setting, origins: dict[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The passes to leave out and those to add, checked; what decided goes into `origins`.

    Where both speak of a pass, the one from the stronger place holds: a flag beats the file.
    """
    removed, added = _located(no_pass, _left_out), _located(to_pass, _added)
    strength = [_PLACES.index(s.origin.partition(":")[0]) for s in (no_pass, to_pass)]
    if strength[0] > strength[1]:
        added = _unsaid(added, removed)
    elif strength[1] > strength[0]:
        removed = _unsaid(removed, added)
    said = [(text, no_pass.origin) for text in removed] + [(t, to_pass.origin) for t in added]
    for text, origin in sorted(said, key=lambda row: row[0] != ALL):
        for one in PASSES if text == ALL else (text.partition("@")[0],):
            origins[f"pass {one}"] = origin
    return tuple(removed), tuple(added)


def _unsaid(weaker: list[str], stronger: list[str]) -> list[str]:
    """What `weaker` says of the passes of which `stronger` says nothing."""
    named = {text.partition("@")[0] for text in stronger}
    return [] if ALL in named else [t for t in weaker if t.partition("@")[0] not in named]


def _added(text: str) -> str:
    return text if text == ALL else str(PassChoice.parse(text))


def _left_out(text: str) -> str:
    name = _added(text)
    if "@" in name:
        raise UsageError(
            "bad-range",
            f"'{text}' names ranges of a pass that is to be left out",
            hint=f"--pass {name} runs it for these alone; --no-pass leaves it out of all",
        )
    return name


def _op_name(text: str) -> str:
    if not re.fullmatch(r"\w+::\w+(\.\w+)?|[^\W\d]\w*(\.\w+)+", text):
        raise UsageError(
            "bad-value",
            f"'{text}' is no name of an op",
            hint=f"write an op as torch registers it ({ATTENTION_OP}), another function as Python "
            "imports it (torch.nn.functional.silu), a method as torch.Tensor.NAME",
        )
    return text


def _located(setting: Setting, parse: Callable[[str], T]) -> list[T]:
    try:
        return [parse(text) for text in setting.values]
    except UsageError as error:
        error.context["origin"] = setting.origin
        raise


def _merge(filed: tuple[RawOption, ...], flags: list[str] | tuple[()]) -> tuple[RawOption, ...]:
    """The options of the file and the flags; the last one of a name holds, sorted by name."""
    rows = (*filed, *map(_raw_option, flags))
    return tuple(row for _, row in sorted({(row.scope, row.name): row for row in rows}.items()))


def _raw_option(text: str) -> RawOption:
    name, equals, value = text.partition("=")
    scoped = name.removeprefix("functorch.")
    if not equals or not scoped.strip():
        raise UsageError(
            "bad-value",
            f"'{text}' is no option with a value",
            context={"origin": "flag"},
            hint="write it as -O KEY=VALUE, for example -O max_autotune=true",
        )
    return RawOption(
        scope="inductor" if scoped == name else "functorch",
        name=scoped.strip(),
        text=value.strip(),
        origin="flag",
    )


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Lets a command take each group of options as one dataclass.

    Returns a function for Typer that has the groups' fields as its parameters.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if isinstance(parameter.annotation, type) and dataclasses.is_dataclass(
            parameter.annotation
        ):
            groups[name] = parameter.annotation
            parameters += _fields(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def call(**values: Any) -> int | None:
        made = {
            name: group(
                **{field.name: values.pop(field.name) for field in dataclasses.fields(group)}
            )
            for name, group in groups.items()
        }
        return function(**values, **made)

    call.__name__ = function.__name__
    call.__doc__ = function.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _fields(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]
