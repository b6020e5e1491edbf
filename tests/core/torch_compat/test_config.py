from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch._inductor.custom_graph_pass import CustomGraphPass

from vllmc.core.errors import UsageError
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.config import (
    VLLMC_SETS,
    Overrides,
    applied,
    snapshot,
    vllmc_overrides,
)
from vllmc.core.torch_compat.config_modules import _stand_in, config_file, value_of
from vllmc.core.torch_compat.config_scope import CAPTURE, EXCLUDED
from vllmc.core.torch_compat.config_source import (
    default_without_environment,
    definitions,
    variables_of,
)
from vllmc.core.torch_compat.config_values import stable
from vllmc.core.torch_compat.minors import MINORS, TORCH
from vllmc.core.torch_compat.options import MODULES, option_names, parse_option
from vllmc.core.torch_compat.system import portable_march

CONFIGS = {"inductor": torch._inductor.config, "functorch": torch._functorch.config}
# Read only together with another variable, which names the device.
WITHOUT_EFFECT = {"TORCHINDUCTOR_AUTOHEURISTIC_COLLECT"}
# What these take, where the kind of an option's default does not tell.
WORDS = {
    "TORCHINDUCTOR_AUTOHEURISTIC_USE": "pad_mm",
    "TORCHINDUCTOR_LITE_MODE": "1",
    "TORCHINDUCTOR_TLX_MODE": "force",
    "TORCHINDUCTOR_WORKER_START": "fork",
    "TORCH_COMPILE_WORKER_MODE": "thread",
}
KEPT = ("PATH", "PYTHONPATH")
PLAIN = vllmc_overrides(CompileSpec())


def values(group: str, overrides: Overrides = PLAIN) -> dict[str, Any]:
    return {entry.name: entry.value for entry in snapshot(group, overrides)}


def origins(group: str, overrides: Overrides = PLAIN, **kwargs: Any) -> dict[str, str]:
    return {entry.name: entry.origin for entry in snapshot(group, overrides, **kwargs)}


def another(value: Any) -> Any:
    """A value that is not `value`, of another kind where there is no telling."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (str, tuple)):
        return value + type(value)("x")
    if isinstance(value, list):
        return [*value, "x"]
    if isinstance(value, set):
        return {*value, "x"}
    if isinstance(value, dict):
        return {**value, "x": 1}
    return "x"


def with_option(group: str, name: str, value: Any) -> Overrides:
    options = {**PLAIN.of(group), name: value}
    return dataclasses.replace(PLAIN, **{group: tuple(sorted(options.items()))})


def run_python(code: str, *, cwd: Path, **environment: str) -> str:
    """The output of a fresh process that has no environment but this, and finds vllmc."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **{n: os.environ[n] for n in KEPT if n in os.environ},
            "HOME": str(cwd),
            **environment,
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("group", ["inductor", "functorch"])
def test_every_option_changes_the_snapshot_or_is_excluded_with_a_reason(group: str) -> None:
    before = values(group)
    wrong = []
    for name in sorted(option_names(group)):
        present = PLAIN.of(group).get(name, value_of(CONFIGS[group], name))
        # Torch says which of them are deprecated.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            after = values(group, with_option(group, name, another(present)))
        excluded = bool(EXCLUDED.get((group, name)))
        if (after == before) is not excluded:
            wrong.append(name)
    assert len(before) > (500 if group == "inductor" else 40)
    assert wrong == []


def test_every_setting_of_capture_changes_the_snapshot() -> None:
    before = values("dynamo")
    for name in before:
        prefix, _, key = name.rpartition(".")
        module = {
            "": torch._dynamo.config,
            "compiler": torch.compiler.config,
            "symbolic_shapes": torch.fx.experimental._config,
        }[prefix]
        if getattr(module._config[key], "deprecated", False):
            continue
        with module.patch({key: another(getattr(module, key))}):
            assert values("dynamo") != before, name
    assert values("dynamo") == before
    assert all(CAPTURE.values())


def test_names_that_are_left_out_exist_but_for_those_that_this_torch_is_said_to_lack() -> None:
    options = {(group, name) for group in CONFIGS for name in option_names(group)}
    settings = {("dynamo", name) for name in values("dynamo")}
    named = {*EXCLUDED, *VLLMC_SETS, ("inductor", "cpp.march")}
    named |= {("dynamo", name) for name in CAPTURE}
    assert named - options - settings == TORCH.absent
    assert set().union(*(has.absent for has in MINORS.values())) <= named


@pytest.mark.parametrize("group", ["inductor", "functorch"])
def test_the_snapshot_holds_all_that_torch_puts_in_its_own_key_and_the_private_options(
    group: str,
) -> None:
    portable = CONFIGS[group].save_config_portable(ignore_private_configs=False)
    private = {name for name in option_names(group) if name.startswith("_")}
    excluded = {name for g, name in EXCLUDED if g == group}
    assert private - excluded
    assert {*portable, *private} - excluded <= set(values(group))


def test_the_snapshot_describes_what_applied_puts_into_force() -> None:
    overrides = vllmc_overrides(
        CompileSpec(
            inductor=(("max_autotune", True), ("cpp.threads", 3)),
            functorch=(("donated_buffer", False),),
        )
    )
    for group in ("inductor", "functorch"):
        config = CONFIGS[group]
        described = values(group, overrides)
        counted = [name for name in overrides.of(group) if name in described]
        assert counted
        outside = {name: stable(getattr(config, name)) for name in counted}
        with applied(overrides):
            inside = {name: stable(getattr(config, name)) for name in counted}
        assert {name: described[name] for name in counted} == inside
        assert all(outside[name] != inside[name] for name in counted)
        assert {name: stable(getattr(config, name)) for name in counted} == outside


def test_each_thread_has_the_overrides_that_it_entered() -> None:
    # Both at once, unless this torch keeps overrides for the whole process.
    both_inside = threading.Barrier(2 if TORCH.local_overrides else 1, timeout=60)
    seen: dict[int, tuple[Any, ...]] = {}

    def work(threads: int) -> None:
        overrides = vllmc_overrides(
            CompileSpec(inductor=(("cpp.threads", threads),), functorch=(("cse", threads == 3),))
        )
        with applied(overrides):
            both_inside.wait()
            seen[threads] = (
                torch._inductor.config.cpp.threads,
                torch._functorch.config.cse,
                values("inductor", overrides)["cpp.threads"],
                values("functorch", overrides)["cse"],
            )
            both_inside.wait()

    workers = [threading.Thread(target=work, args=(n,)) for n in (3, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == {3: (3, True, 3, True), 5: (5, False, 5, False)}


@pytest.mark.skipif(not TORCH.local_overrides, reason="this torch has one set for all threads")
def test_a_thread_started_inside_does_not_see_the_overrides() -> None:
    seen = []
    with applied(with_option("inductor", "cpp.threads", 3)):
        worker = threading.Thread(target=lambda: seen.append(torch._inductor.config.cpp.threads))
        worker.start()
        worker.join()
    assert seen == [-1]


def test_origins_tell_the_user_from_vllmc_and_from_torch() -> None:
    spec = CompileSpec(
        inductor=(("cpp.simdlen", 256), ("cpp.threads", 4), ("max_autotune", True)),
        functorch=(("cse", False),),
    )
    overrides = vllmc_overrides(spec)
    given = {("inductor", "max_autotune"): "file:vllmc.toml:3"}
    found = origins("inductor", overrides, option_origins=given)
    assert found["max_autotune"] == "file:vllmc.toml:3"
    assert found["cpp.threads"] == "flag"
    assert found["cpp.dynamic_threads"] == "vllmc"
    assert found["dce"] == "default"
    assert origins("functorch", overrides)["cse"] == "flag"
    # What the user sets beats a variable; what nobody sets shows the variable.
    variables = {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_CPP_MIN_CHUNK_SIZE": "512"}
    found = origins("inductor", overrides, option_origins=given, environment=variables)
    assert found["max_autotune"] == "file:vllmc.toml:3"
    assert found["cpp.min_chunk_size"] == "env:TORCHINDUCTOR_CPP_MIN_CHUNK_SIZE"


DESCRIBE = """
import json, os, torch
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.config import snapshot, vllmc_overrides
overrides = vllmc_overrides(CompileSpec())
print(json.dumps({
    f"{group}.{entry.name}": [entry.value, entry.origin, entry.is_default]
    for group in ("inductor", "functorch", "dynamo")
    for entry in snapshot(group, overrides, environment=dict(os.environ))
}))
"""


def test_variables_are_named_as_origins_however_torch_reads_them(tmp_path: Path) -> None:
    found = json.loads(
        run_python(
            DESCRIBE,
            cwd=tmp_path,
            TORCHINDUCTOR_MAX_AUTOTUNE="1",
            TORCHINDUCTOR_AUTOTUNE_AT_COMPILE_TIME="1",
            TORCHINDUCTOR_CPP_MIN_CHUNK_SIZE="512",
            TORCHINDUCTOR_DISABLED_PASSES="cse",
            TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD="1",
            TORCHDYNAMO_CAPTURE_SCALAR_OUTPUTS="1",
            TORCHINDUCTOR_CUTLASS_DYNAMIC_CLUSTER_SHAPE="4,1,1",
        )
    )
    allow = "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"
    cluster = "env:TORCHINDUCTOR_CUTLASS_DYNAMIC_CLUSTER_SHAPE"
    expected = {
        # Read inline, by a helper, by an imported helper, by the registry.
        "inductor.max_autotune": [True, "env:TORCHINDUCTOR_MAX_AUTOTUNE", False],
        "inductor.triton.autotune_at_compile_time": [
            True,
            "env:TORCHINDUCTOR_AUTOTUNE_AT_COMPILE_TIME",
            False,
        ],
        "inductor.disabled_passes": ["cse", "env:TORCHINDUCTOR_DISABLED_PASSES", False],
        "functorch.autograd_cache_allow_custom_autograd_functions": [True, f"env:{allow}", False],
        "dynamo.capture_scalar_outputs": [True, "env:TORCHDYNAMO_CAPTURE_SCALAR_OUTPUTS", False],
        # Set to what it is anyway.
        "inductor.cpp.min_chunk_size": [512, "env:TORCHINDUCTOR_CPP_MIN_CHUNK_SIZE", True],
        # Through another option, and inherited by a class.
        "inductor.cutlass.cutlass_dynamic_cluster_shape": [[4, 1, 1], cluster, False],
        "inductor.cuda.cutlass_dynamic_cluster_fallback": [[4, 1, 1], cluster, False],
    }
    if not definitions("torch._inductor.config")["triton.autotune_at_compile_time"].variables:
        # Torch 2.11 reads no variable for it.
        del expected["inductor.triton.autotune_at_compile_time"]
    assert {name: found[name] for name in expected} == expected


def test_without_variables_only_what_vllmc_sets_differs_from_the_default(tmp_path: Path) -> None:
    found = json.loads(run_python(DESCRIBE, cwd=tmp_path))
    changed = {name: row[1] for name, row in found.items() if not row[2]}
    march = {"inductor.cpp.march"} if portable_march() else set()
    lacking = {f"{group}.{name}" for group, name in TORCH.absent}
    expected = march | {
        "inductor.aot_inductor.enable_line_tables",
        "inductor.cpp.dynamic_threads",
        "inductor.cpp.threads",
        "inductor.cpp.vec_isa_ok",
    }
    assert set(changed) == expected - lacking
    assert set(changed.values()) == {"vllmc"}
    assert {row[1] for row in found.values()} == {"default", "vllmc"}


STAND_IN = """
import json, os, sys, torch
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.config import snapshot, vllmc_overrides
from vllmc.core.torch_compat.options import option_names, parse_option

def everything():
    overrides = vllmc_overrides(CompileSpec(inductor=(("max_autotune", True),)))
    groups = ("inductor", "functorch", "dynamo")
    return (
        [snapshot(group, overrides, environment=os.environ) for group in groups],
        option_names("inductor"),
        parse_option("cpp.simdlen=256"),
    )

before = everything()
compilers = {"torch._dynamo", "torch._inductor", "sympy"}
assert not compilers & set(sys.modules), compilers & set(sys.modules)
import torch._inductor.config
import transformers.models.llama.modeling_llama
assert everything() == before
torch._inductor.config.dce = True
torch._dynamo.config.specialize_float = True
after = everything()
changed = [a.name for s, t in zip(before[0], after[0]) for a, b in zip(s, t) if a != b]
assert changed == ["dce", "specialize_float"], changed
"""


def test_a_snapshot_is_the_same_with_and_without_the_compilers_imported(tmp_path: Path) -> None:
    run_python(STAND_IN, cwd=tmp_path, TORCHINDUCTOR_COORDINATE_DESCENT_TUNING="1")


@pytest.mark.parametrize(
    "module",
    [
        "torch._inductor.config",
        "torch._functorch.config",
        "torch._dynamo.config",
        "torch.compiler.config",
        "torch.fx.experimental._config",
    ],
)
def test_the_source_of_a_config_is_read_whole(module: str) -> None:
    registered = sys.modules[module]._config
    defined = definitions(module)
    assert set(registered) - set(defined) <= {"TYPE_CHECKING"}
    for name in registered:
        definition = defined.get(name)
        if definition is None or not definition.variables:
            continue
        default = default_without_environment(module, name)
        if not {*definition.variables} & {*os.environ}:
            assert default == registered[name].default, name


@pytest.mark.parametrize("module", sorted({*MODULES.values(), "torch._dynamo.config"}))
def test_of_one_variable_alone_every_option_that_reads_it_is_known(module: str) -> None:
    for name, definition in definitions(module).items():
        for variable in definition.variables:
            assert variables_of(module, name, {variable}) == [variable]
        assert variables_of(module, name, {"PATH", "VLLMC_CACHE_DIR"}) == []


def test_every_variable_in_the_source_of_inductors_config_belongs_to_an_option() -> None:
    module = "torch._inductor.config"
    source = Path(sys.modules[module].__file__ or "").read_text()
    read = set(re.findall(r"(?:environ\.get|getenv|tristate_env|environ\[)\(?\s*\"(\w+)\"", source))
    known = {name for definition in definitions(module).values() for name in definition.variables}
    # Read by a function that no option uses.
    assert read - known == {"MAST_HPC_JOB_NAME", "ROLE_RANK"}
    assert len(read) > 100


def config_under(module: str, environment: dict[str, str]) -> dict[str, str]:
    """What the source of a config makes of these variables: each option, to compare."""
    with pytest.MonkeyPatch.context() as patch:
        for name in variables_in(module):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        fresh = _stand_in.__wrapped__(module)
    return {
        name: json.dumps(
            [stable(e.default), stable(e.env_value_force), stable(e.env_value_default)]
        )
        for name, e in fresh._config.items()
        if not isinstance(e.default, FunctionType)
    }


def variables_in(module: str) -> list[str]:
    """All that could be a variable's name in the source of a config."""
    return sorted(
        set(re.findall(r"""["']([A-Z][A-Z0-9_]{4,})["']""", config_file(module).read_text()))
    )


def effective(module: str, variable: str) -> str:
    """A text that makes a difference in the first option that the variable is said to set."""
    if variable in WORDS:
        return WORDS[variable]
    for name, definition in definitions(module).items():
        if variable in definition.variables:
            default = default_without_environment(module, name)
            number = isinstance(default, (int, float)) and not isinstance(default, bool)
            return "7" if number else "x" if isinstance(default, str) else "0" if default else "1"
    return "1"


@pytest.mark.parametrize("group", ["inductor", "functorch", "dynamo"])
def test_an_option_that_a_variable_changes_names_it_as_origin_and_no_other(group: str) -> None:
    module = MODULES.get(group, "torch._dynamo.config")
    variables = variables_in(module)
    probes = {name: effective(module, name) for name in variables}
    before = config_under(module, {})
    nothing = Overrides(inductor=(), functorch=(), chosen=frozenset())
    seen = set()
    # The variables with a bit set in their number, and those without: any two are once apart.
    for bit, value in itertools.product(range(len(variables).bit_length()), (0, 1)):
        given = {v: probes[v] for i, v in enumerate(variables) if i >> bit & 1 == value}
        after = config_under(module, given)
        for entry in snapshot(group, nothing, environment=given):
            how, _, name = entry.origin.partition(":")
            changed = after.get(entry.name, "") != before.get(entry.name, "")
            assert how == "env" or not changed, (entry.name, given)
            if how == "env":
                assert name in given
                if changed:
                    seen.add(name)
    said = {
        definition.variables[0]
        for name, definition in definitions(module).items()
        if definition.variables and name in values(group)
    }
    assert said - seen <= WITHOUT_EFFECT
    assert len(seen) >= {"inductor": 100, "functorch": 3, "dynamo": 3}[group]


class Pass(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        graph.lint()

    def uuid(self) -> str:
        return "the pass, version 1"


class Policy:
    def __init__(self) -> None:
        self.pattern = re.compile("a+")
        self.places = {"/tmp/b", "/tmp/a"}


def test_values_that_are_no_json_have_a_stable_text() -> None:
    assert stable(Pass()) == {"class": f"{__name__}.Pass", "uuid": "the pass, version 1"}
    text = stable(another)
    assert isinstance(text, str)
    assert re.fullmatch(rf"{re.escape(__name__)}\.another#[0-9a-f]{{64}}", text)
    assert stable(max) == "builtins.max"
    assert stable({"b", "a"}) == ["a", "b"]
    assert stable((1, None, 2.5, float("inf"))) == [1, None, 2.5, "inf"]
    assert stable({1: torch.float32}) == {"1": "torch.float32"}
    assert stable(torch.ops.aten.add.Tensor) == "aten.add.Tensor"
    bound = stable(functools.partial(another, value=1))
    assert bound == {"partial": text, "arguments": [], "keywords": {"value": 1}}
    for value in (Policy(), lambda x: x, functools.partial(Policy().__init__), b"\0"):
        shown = json.dumps(stable(value))
        assert "0x" not in shown
        assert "/tmp" not in shown


def test_paths_change_a_value_without_being_in_it() -> None:
    a, b = (
        values("inductor", with_option("inductor", "profile_bandwidth_output", path))
        for path in ("/tmp/one", "/tmp/two")
    )
    assert a["profile_bandwidth_output"] != b["profile_bandwidth_output"]
    assert re.fullmatch("path:[0-9a-f]{64}", a["profile_bandwidth_output"])


def test_a_custom_pass_counts_by_its_uuid() -> None:
    class Later(Pass):
        def uuid(self) -> str:
            return "the pass, version 2"

    name = "post_grad_custom_post_pass"
    first, again, later = (
        values("inductor", with_option("inductor", name, p)) for p in (Pass(), Pass(), Later())
    )
    assert first == again
    assert first != later


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_autotune=true", ("inductor", "max_autotune", True)),
        ("max_autotune = False", ("inductor", "max_autotune", False)),
        ("functorch.cse=false", ("functorch", "cse", False)),
        ("functorch.activation_memory_budget=1", ("functorch", "activation_memory_budget", 1.0)),
        ("cpp.simdlen=256", ("inductor", "cpp.simdlen", 256)),
        ("cpp.simdlen=none", ("inductor", "cpp.simdlen", None)),
        ("cpu_gpu_bw=12.5", ("inductor", "cpu_gpu_bw", 12.5)),
        ("max_autotune_gemm_backends=ATEN,CPP", None),
        ("max_autotune_gemm_backends=", ("inductor", "max_autotune_gemm_backends", "")),
        ("cpp.march=native", ("inductor", "cpp.march", "native")),
        ('custom_should_partition_ops=["a::b"]', None),
        # A number where text is asked for.
        ("cutlass.cutlass_instantiation_level=0", None),
        # A list where torch has a tuple.
        ("cutlass.cutlass_dynamic_cluster_shape=[4, 1, 1]", None),
        # Set, though no factor.
        ("compile_threads=4", ("inductor", "compile_threads", 4)),
    ],
)
def test_options_are_read_as_the_type_that_they_have(text: str, expected: Any) -> None:
    special = {
        "max_autotune_gemm_backends": "ATEN,CPP",
        "custom_should_partition_ops": ["a::b"],
        "cutlass.cutlass_instantiation_level": "0",
        "cutlass.cutlass_dynamic_cluster_shape": (4, 1, 1),
    }
    if text.startswith("cpp.march") and "cpp.march" not in option_names("inductor"):
        pytest.skip("this torch has no such option")
    group, name, value = parse_option(text)
    assert (group, name, value) == (expected or ("inductor", name, special[name]))
    wanted = expected[2] if expected else special[name]
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("max_autotun=true", "unknown-option", "max_autotune"),
        ("threads=3", "unknown-option", "cpp.threads"),
        ("functorch.cs=true", "unknown-option", "functorch.cse"),
        ("activation_memory_budget=1", "unknown-option", "functorch.activation_memory_budget"),
        ("max_autotune", "bad-option", "KEY=VALUE"),
        ("=true", "bad-option", "KEY=VALUE"),
        ("max_autotune=1", "bad-option", "true or false"),
        ("cpp.threads=many", "bad-option", "a whole number"),
        ("cpp.threads=1.5", "bad-option", "a whole number"),
        ("cpp.threads=none", "bad-option", "a whole number"),
        ('pre_grad_fusion_options={"a": {}}', "bad-option", "cannot be set"),
    ],
)
def test_options_that_torch_does_not_have_are_refused_with_the_nearest_or_the_type(
    text: str, code: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_option(text)
    assert caught.value.code == code
    assert hint in caught.value.hint


def test_a_spec_with_an_unknown_option_is_refused() -> None:
    with pytest.raises(UsageError, match="no option 'max_autotun'"):
        vllmc_overrides(CompileSpec(inductor=(("max_autotun", True),)))


def test_an_excluded_option_is_applied_and_changes_no_snapshot() -> None:
    overrides = vllmc_overrides(CompileSpec(inductor=(("compile_threads", 7),)))
    with applied(overrides):
        assert torch._inductor.config.compile_threads == 7
    assert values("inductor", overrides) == values("inductor")


GENERATE = """
import contextlib, hashlib, json, os, re, sys
threads, cores = map(int, sys.argv[1:])
os.cpu_count = lambda: cores
import torch
import torch._inductor.config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import get_code
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.config import applied, vllmc_overrides

torch.set_num_threads(threads)

functions = [
    lambda x, i: torch.softmax(x * 2, -1).sum(0),
    lambda x, i: (x * x).sum(),
    lambda x, i: torch.zeros(64).index_add(0, i, x[:, 0]),
    lambda x, i: x.sin() + x[:, :1],
]
inputs = torch.ones(3, 4096), torch.zeros(3, dtype=torch.int64)

def code(scope):
    torch._dynamo.reset()
    kernels = []
    with scope:
        for function in functions:
            for source in get_code(torch.compile(function, fullgraph=True), *inputs):
                kernels += re.findall(r"r'''(.*?)'''", source, re.DOTALL)
    assert len(kernels) >= len(functions), kernels
    return "\\n".join(re.sub(r"#include \\S+", "", kernel) for kernel in kernels)

overrides = vllmc_overrides(CompileSpec())
with applied(overrides):
    isa = str(pick_vec_isa())
plain = torch._inductor.config.patch({"cpp.vec_isa_ok": True})
few = torch._inductor.config.patch({"cpp.vec_isa_ok": True, "cpp.dynamic_threads": True})
print(json.dumps({
    "applied": code(applied(overrides)),
    "plain": code(plain),
    "dynamic_only": code(few),
    "isa": isa,
    "capability": torch.backends.cpu.get_cpu_capability(),
}))
"""


@pytest.mark.thorough
@pytest.mark.slow
def test_generated_code_does_not_depend_on_the_number_of_threads_or_cores(tmp_path: Path) -> None:
    one, many = (
        json.loads(
            run_python(
                f"import sys; sys.argv = ['', '{threads}', '{cores}']\n{GENERATE}",
                cwd=tmp_path,
                TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
                TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
                OMP_NUM_THREADS=str(threads),
            )
        )
        for threads, cores in ((1, 2), (2, 64))
    )
    assert one["applied"] == many["applied"]
    # Neither torch's defaults nor half of the overrides do that.
    assert one["plain"] != many["plain"]
    assert one["dynamic_only"] != many["dynamic_only"]
    # Without its probes Inductor picks the instruction set that the key names.
    if platform.machine() == "x86_64":
        assert one["isa"].split()[0] == one["capability"].lower()
