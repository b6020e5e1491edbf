from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.core import TyperGroup

from vllmc.cli.app import run
from vllmc.cli.options import CommonFlags, CompileFlags, CompileRequest, command, compile_request
from vllmc.cli.settings import load_settings
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.spec import ATTENTION_OP, CompileRange

Ask = Callable[..., CompileRequest]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Makes a request of flags, environment variables (upper case) and a config file."""

    def request(toml: str = "", model: str | None = None, **given: Any) -> CompileRequest:
        (tmp_path / "vllmc.toml").write_text(toml)
        environment = {k: given.pop(k) for k in list(given) if k.isupper()}
        settings = load_settings(environment=environment, directory=tmp_path)
        return compile_request(settings, CompileFlags(**given), model)

    return request


def test_nothing_given_is_the_default_model_with_the_contract_s_defaults(ask: Ask) -> None:
    request = ask()
    assert request.model == "tiny-llama"
    assert (request.device, request.dtype, request.backend) == ("auto", "auto", "inductor")
    assert (request.ranges, request.sizes) == ((CompileRange(1, 8192),), ())
    assert (request.dynamic_shapes, request.layer_names) == ("unbacked", "hoisted")
    assert request.experts == "fused"
    assert request.splitting_ops == (ATTENTION_OP,)
    assert request.split_kv_update is False
    assert (request.layers, request.options) == (None, ())
    assert request.quantize is None
    assert set(request.origins.values()) == {"default"}


def test_each_flag_reaches_the_request(ask: Ask) -> None:
    request = ask(
        model="gpt2",
        device="cuda:1",
        dtype="bfloat16",
        compile_range=["5:8", "1:4"],
        compile_size=["8", "2", "8"],
        dynamic_shapes="backed-size-oblivious",
        layer_names="baked",
        experts="grouped_mm",
        splitting_op=["my::op", "other::op.default", "my::op"],
        split_kv_update=True,
        quantize="int8-dynamic",
        option=["max_autotune=true"],
        add_pass=["norm-quant@1:8"],
        no_pass=["all"],
        layers="3",
        backend="eager",
    )
    assert (request.model, request.layers, request.backend) == ("gpt2", 3, "eager")
    assert (request.device, request.dtype) == ("cuda:1", "bfloat16")
    assert request.ranges == (CompileRange(1, 4), CompileRange(5, 8))
    assert request.sizes == (2, 8)
    assert (request.dynamic_shapes, request.layer_names) == ("backed-size-oblivious", "baked")
    assert request.experts == "grouped_mm"
    assert request.splitting_ops == ("my::op", "other::op.default")
    assert request.split_kv_update is True
    assert request.quantize == "int8-dynamic"
    assert (request.added_passes, request.removed_passes) == (("norm-quant@1:8",), ("all",))
    assert set(request.origins.values()) == {"flag"}


def test_each_pass_has_the_origin_of_what_decided_on_it(ask: Ask) -> None:
    request = ask(
        toml='no-pass = ["no-ops", "norm-quant"]\n', VLLMC_PASS="norm-quant@1:8", no_pass=[]
    )
    assert request.added_passes == ("norm-quant@1:8",)
    assert request.removed_passes == ("no-ops",)
    assert request.origins["pass norm-quant"] == "env:VLLMC_PASS"
    assert request.origins["pass no-ops"] == "file:vllmc.toml:1"
    assert "pass activation-quant" not in request.origins


def test_of_a_pass_that_two_places_name_the_stronger_decides(ask: Ask) -> None:
    added = 'pass = ["norm-quant", "no-ops@1:8"]\n'
    request = ask(toml=added, no_pass=["norm-quant"])
    assert (request.added_passes, request.removed_passes) == (("no-ops@1:8",), ("norm-quant",))
    assert request.origins["pass norm-quant"] == "flag"
    assert request.origins["pass no-ops"] == "file:vllmc.toml:1"
    assert ask(toml=added, VLLMC_NO_PASS="all").added_passes == ()
    request = ask(toml='no-pass = ["all"]\n', add_pass=["norm-quant"])
    assert (request.added_passes, request.removed_passes) == (("norm-quant",), ("all",))
    request = ask(toml='no-pass = ["no-ops"]\n', add_pass=["all"])
    assert (request.added_passes, request.removed_passes) == (("all",), ())
    request = ask(no_pass=["no-ops"], add_pass=["all"])
    assert (request.added_passes, request.removed_passes) == (("all",), ("no-ops",))


def test_a_pass_is_left_out_of_all_ranges_or_none(ask: Ask) -> None:
    with pytest.raises(UsageError, match="is to be left out") as error:
        ask(no_pass=["norm-quant@1:8"])
    assert error.value.code == "bad-range"


def test_a_pass_that_is_not_known_is_refused_wherever_it_is_named(ask: Ask) -> None:
    for given in ({"add_pass": ["norm"]}, {"no_pass": ["norm"]}):
        with pytest.raises(UsageError, match="no pass 'norm'") as error:
            ask(**given)
        assert error.value.context["origin"] == "flag"


@pytest.mark.parametrize("text", ["1", "true"])
def test_a_truth_value_is_set_and_taken_back_at_each_place(ask: Ask, text: str) -> None:
    on = "split-kv-update = true"
    assert ask(toml=on).split_kv_update
    assert ask(VLLMC_SPLIT_KV_UPDATE=text).split_kv_update
    assert not ask(toml=on, VLLMC_SPLIT_KV_UPDATE="0").split_kv_update
    taken_back = ask(VLLMC_SPLIT_KV_UPDATE=text, split_kv_update=False)
    assert (taken_back.split_kv_update, taken_back.origins["split-kv-update"]) == (False, "flag")
    with pytest.raises(UsageError, match="'yes' is no split-kv-update"):
        ask(VLLMC_SPLIT_KV_UPDATE="yes")
    with pytest.raises(VllmcError, match="should be true or false, and is 'true'"):
        ask(toml='split-kv-update = "true"')


def test_every_origin_is_told(ask: Ask) -> None:
    request = ask(
        toml='\nbackend = "eager"\ndtype = "float16"\n', VLLMC_DTYPE="bfloat16", layers="2"
    )
    assert (request.backend, request.dtype, request.layers) == ("eager", "bfloat16", 2)
    assert request.origins["backend"] == "file:vllmc.toml:2"
    assert request.origins["dtype"] == "env:VLLMC_DTYPE"
    assert request.origins["layers"] == "flag"
    assert request.origins["device"] == "default"


def test_options_of_the_file_and_the_flags_are_merged_by_name(ask: Ask) -> None:
    request = ask(
        toml="[inductor]\nmax_autotune = false\ncpp_wrapper = true\n",
        option=[
            "max_autotune=true",
            "functorch.cse=false",
            "tag=a=b",
            "max_autotune = 1",
            "functorch.x=",
        ],
    )
    assert [(o.scope, o.name, o.text, o.origin) for o in request.options] == [
        ("functorch", "cse", "false", "flag"),
        ("functorch", "x", "", "flag"),
        ("inductor", "cpp_wrapper", "true", "file:vllmc.toml:3"),
        ("inductor", "max_autotune", "1", "flag"),
        ("inductor", "tag", "a=b", "flag"),
    ]


@pytest.mark.parametrize("text", ["max_autotune", "=1", "functorch.=1", "", " = 2"])
def test_an_option_without_name_or_value_is_refused(ask: Ask, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(option=[text])
    assert caught.value.code == "bad-value"
    assert "KEY=VALUE" in caught.value.hint


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ({"device": "gpu"}, "bad-value"),
        ({"device": "cuda:"}, "bad-value"),
        ({"device": "cpu:0"}, "bad-value"),
        ({"dtype": "float64"}, "bad-value"),
        ({"dynamic_shapes": "static"}, "bad-value"),
        ({"layer_names": "hoist"}, "bad-value"),
        ({"experts": "eager"}, "bad-value"),
        ({"backend": "xla"}, "bad-value"),
        ({"layers": "0"}, "bad-value"),
        ({"layers": "two"}, "bad-value"),
        ({"compile_size": ["0"]}, "bad-value"),
        ({"compile_size": ["-1"]}, "bad-value"),
        ({"splitting_op": ["attention"]}, "bad-value"),
        ({"compile_range": ["9:2"]}, "bad-range"),
        ({"compile_range": ["0:2"]}, "bad-range"),
        ({"compile_range": ["1-2"]}, "bad-range"),
        ({"compile_range": ["1:8", "8:9"]}, "overlapping-ranges"),
    ],
)
def test_a_value_that_cannot_be_meant_is_wrong_usage(
    ask: Ask, flags: dict[str, Any], code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        ask(**flags)
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    "variable", ["DEVICE", "DTYPE", "COMPILE_RANGE", "COMPILE_SIZE", "LAYERS", "SPLITTING_OP"]
)
def test_a_bad_value_says_where_it_came_from(ask: Ask, variable: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(**{f"VLLMC_{variable}": "nonsense"})
    assert caught.value.context["origin"] == f"env:VLLMC_{variable}"


def test_neither_range_nor_size_is_refused(ask: Ask) -> None:
    with pytest.raises(UsageError, match="neither"):
        ask(toml="compile-range = []\n")
    assert ask(toml="compile-range = []\ncompile-size = [4]\n").sizes == (4,)


def test_a_command_line_reaches_the_groups_and_the_other_parameters(workplace: Path) -> None:
    seen: dict[str, Any] = {}

    @command
    def show(
        model: Annotated[str | None, typer.Argument()] = None,
        *,
        common: CommonFlags,
        flags: CompileFlags,
        force: Annotated[bool, typer.Option("--force")] = False,
    ) -> int:
        seen.update(model=model, common=common, flags=flags, force=force)
        return 3

    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("show")(show)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    words = "show gpt2 -v -v -q --force --compile-range 1:4 --compile-range 5:8 -O a=1 -O b=2"
    assert run(group, words.split()) == 3
    assert (seen["model"], seen["force"]) == ("gpt2", True)
    assert seen["common"] == CommonFlags(verbose=2, quiet=True)
    assert seen["flags"] == CompileFlags(compile_range=["1:4", "5:8"], option=["a=1", "b=2"])


def test_a_command_keeps_its_name_and_its_help() -> None:
    @command
    def shown(common: CommonFlags) -> None:
        """What it does."""

    assert (shown.__name__, shown.__doc__) == ("shown", "What it does.")
    assert "json" in inspect.signature(shown).parameters
    assert "common" not in inspect.signature(shown).parameters


@pytest.mark.parametrize(
    ("flags", "verbosity"),
    [({}, 0), ({"verbose": 1}, 1), ({"quiet": True}, -1), ({"quiet": True, "verbose": 2}, -1)],
)
def test_quiet_beats_verbose(flags: dict[str, Any], verbosity: int) -> None:
    output = CommonFlags(**flags).output("models")
    assert (output.command, output.verbosity) == ("models", verbosity)
