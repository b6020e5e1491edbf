from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from vllmc.core.cache import facts
from vllmc.core.cache.factor_table import (
    CUDA_ENVIRONMENT,
    ENVIRONMENT,
    FACTORS,
    GPU_FACTORS,
    GROUPS,
    ORIGINS,
)
from vllmc.core.cache.factors import excluded, program_factors, unit_factors
from vllmc.core.cache.key import Factor, key_of
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.torch_compat import system

PATH = os.environ["PATH"]
IMPORTS = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
MODEL = (Factor(group="model", name="layers", value=2),)


def factors_of(
    cache: Path | None,
    spec: CompileSpec | None = None,
    origins: dict[tuple[str, str], str] | None = None,
    **environment: str,
) -> tuple[Factor, ...]:
    return program_factors(
        spec=spec or CompileSpec(),
        model_factors=MODEL,
        environment={"PATH": PATH, **environment},
        cache_dir=cache,
        option_origins=origins or {},
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain(cache: Path) -> tuple[Factor, ...]:
    return factors_of(cache)


def named(factors: tuple[Factor, ...], group: str, name: str) -> Factor:
    [factor] = [f for f in factors if f.identity == (group, name)]
    return factor


def test_factors_come_in_their_groups_each_name_once(plain: tuple[Factor, ...]) -> None:
    assert {factor.group for factor in plain} == {
        "environment",
        "versions",
        "system",
        "code",
        "inductor",
        "functorch",
        "dynamo",
        "spec",
        "passes",
        "model",
    }
    assert len({factor.identity for factor in plain}) == len(plain)
    rows = [factor.to_json() for factor in plain]
    assert [Factor.from_json(row) for row in json.loads(json.dumps(rows))] == list(plain)


def test_every_factor_but_those_of_configs_and_model_is_described(
    plain: tuple[Factor, ...],
) -> None:
    described = {*FACTORS, *(("environment", name) for name in ENVIRONMENT)}
    groups = {group for group, _ in described}
    assert {f.identity for f in plain if f.group in groups} == described
    assert not {*FACTORS} & {*GPU_FACTORS}
    told = {i for i, what in FACTORS.items() if what.startswith("provenance")}
    assert {f.identity for f in plain if not f.affects_key} == told
    assert {f.group for f in plain} | {"graph", "range"} == {*GROUPS}
    assert {f.origin.partition(":")[0] for f in plain} <= {o.partition(":")[0] for o in ORIGINS}


def test_the_same_question_has_the_same_answer(cache: Path, plain: tuple[Factor, ...]) -> None:
    assert factors_of(cache) == plain
    assert key_of(factors_of(None)) == key_of(plain)


PRINT_KEY = """
import json, os, sys
from pathlib import Path
from vllmc.core.cache.factors import program_factors
from vllmc.core.cache.key import key_of
from vllmc.core.spec import CompileSpec
factors = program_factors(
    spec=CompileSpec(),
    model_factors=(),
    environment=dict(os.environ),
    cache_dir=Path(sys.argv[1]),
    option_origins={},
)
print(key_of(factors))
print(json.dumps([factor.to_json() for factor in factors]))
"""


def key_in_process(cache: Path, cwd: Path, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PRINT_KEY, str(cache)],
        env={"PATH": PATH, **IMPORTS, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    key, rows = done.stdout.splitlines()
    return key, rows


def test_user_place_threads_and_surroundings_change_no_key(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "another-home"
    other.mkdir()
    key, rows = key_in_process(cache, tmp_path, HOME=str(tmp_path), PYTHONHASHSEED="1")
    same, their_rows = key_in_process(
        tmp_path / "empty-cache",
        other,
        HOME=str(other),
        USER="someone-else",
        LC_ALL="C",
        PYTHONHASHSEED="2",
        CI="true",
        CXX="no-such-compiler",
        OMP_NUM_THREADS="1",
        TORCHINDUCTOR_COMPILE_THREADS="1",
        TORCHINDUCTOR_CACHE_DIR=str(other / "inductor"),
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
        TORCHINDUCTOR_AUTOGRAD_CACHE="1",
        TORCH_LOGS_OUT=str(other / "log"),
        POD_IP="10.1.2.3",
        HF_TOKEN="hf_averysecrettoken",
    )
    assert key == same
    for foreign in (str(tmp_path), str(Path(torch.__file__).parent), "10.1.2.3", "averysecret"):
        assert foreign not in rows + their_rows


@pytest.mark.parametrize(
    "spec",
    [
        CompileSpec(dtype="bfloat16"),
        CompileSpec(ranges=(CompileRange(1, 16), CompileRange(17, 8192))),
        CompileSpec(sizes=(1,)),
        CompileSpec(dynamic_shapes="backed"),
        CompileSpec(layer_names="baked"),
        CompileSpec(splitting_ops=("aten::mm",)),
        CompileSpec(split_kv_update=True),
        CompileSpec(backend="eager"),
        CompileSpec(inductor=(("max_autotune", True),)),
        CompileSpec(inductor=(("_micro_pipeline_tp", True),)),
        CompileSpec(inductor=(("cpp.threads", 2),)),
        CompileSpec(functorch=(("donated_buffer", False),)),
    ],
)
def test_everything_in_the_spec_changes_the_key(
    spec: CompileSpec, cache: Path, plain: tuple[Factor, ...]
) -> None:
    assert key_of(factors_of(cache, spec)) != key_of(plain)


def test_the_order_of_ranges_sizes_and_ops_changes_no_key(cache: Path) -> None:
    a, b = CompileRange(1, 16), CompileRange(17, 64)
    keys = {
        key_of(factors_of(cache, CompileSpec(ranges=ranges, sizes=sizes, splitting_ops=ops)))
        for ranges, sizes, ops in (
            ((a, b), (1, 2), ("x::y", "x::z")),
            ((b, a), (2, 1, 1), ("x::z", "x::y")),
        )
    }
    assert len(keys) == 1


def test_options_that_are_left_out_change_no_key(cache: Path, plain: tuple[Factor, ...]) -> None:
    spec = CompileSpec(inductor=(("compile_threads", 3), ("trace.enabled", False)))
    assert key_of(factors_of(cache, spec)) == key_of(plain)
    reasons = dict(excluded())
    assert {"inductor.compile_threads", "inductor.trace.enabled"} <= set(reasons)
    assert all(reasons.values())


def test_an_unknown_option_is_refused(cache: Path) -> None:
    with pytest.raises(UsageError, match="max_autotun"):
        factors_of(cache, CompileSpec(inductor=(("max_autotun", True),)))


def test_origins_are_handed_on(cache: Path) -> None:
    spec = CompileSpec(dtype="float16", inductor=(("max_autotune", True),))
    origins = {("spec", "dtype"): "env:VLLMC_DTYPE", ("inductor", "max_autotune"): "flag"}
    factors = factors_of(cache, spec, origins)
    assert named(factors, "spec", "dtype").origin == "env:VLLMC_DTYPE"
    assert not named(factors, "spec", "dtype").is_default
    assert named(factors, "spec", "backend").origin == "default"
    assert named(factors, "spec", "backend").is_default
    assert named(factors, "inductor", "max_autotune").origin == "flag"
    assert named(factors, "inductor", "cpp.threads").origin == "vllmc"
    assert named(factors, "versions", "torch").origin == "probe"


def test_listed_variables_change_the_key_and_others_do_not(
    cache: Path, plain: tuple[Factor, ...]
) -> None:
    for name in ENVIRONMENT:
        factors = factors_of(cache, **{name: "1"})
        assert key_of(factors) != key_of(plain), name
        assert named(factors, "environment", name).origin == f"env:{name}"
    # Triton compiles nothing for the CPU.
    others = dict.fromkeys(CUDA_ENVIRONMENT, "1") | {"POD_IP": "10.1.2.3", "TERM": "dumb"}
    assert key_of(factors_of(cache, **others)) == key_of(plain)


def test_a_variable_that_names_a_file_counts_by_its_contents(cache: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("same")
    two.write_text("same")
    name = next(iter(ENVIRONMENT))
    keys = [key_of(factors_of(cache, **{name: str(file)})) for file in (one, two)]
    assert keys[0] == keys[1]
    two.write_text("other")
    assert key_of(factors_of(cache, **{name: str(two)})) != keys[0]


def test_a_switch_of_torch_changes_the_key(cache: Path, plain: tuple[Factor, ...]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert key_of(factors_of(cache)) != key_of(plain)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert key_of(factors_of(cache)) != key_of(plain)


def test_the_compiler_is_provenance(cache: Path, plain: tuple[Factor, ...]) -> None:
    without = factors_of(cache, PATH="/nowhere")
    assert named(without, "system", "cxx_compiler").value is None
    assert not named(without, "system", "cxx_compiler").affects_key
    assert key_of(without) == key_of(plain)


def test_a_compiler_is_named_with_its_version_and_no_path(tmp_path: Path) -> None:
    program = tmp_path / "my++"
    runs = tmp_path / "runs"
    program.write_text(f"#!/bin/sh\necho run >> {runs}\necho 'my++ 1.2.3'\necho more\n")
    program.chmod(0o755)

    def ask() -> str | None:
        candidates = (None, "absent++", "my++")
        search = f"/nowhere:{tmp_path}:/bin"
        return system.cxx_compiler(candidates, search_path=search, cache=tmp_path / "cache")

    assert ask() == "my++: my++ 1.2.3"
    assert ask() == "my++: my++ 1.2.3"
    assert runs.read_text() == "run\n"
    program.write_text(program.read_text().replace("1.2.3", "1.2.30"))
    assert ask() == "my++: my++ 1.2.30"


def test_torchs_key_is_what_inductor_says_it_is() -> None:
    from torch._inductor.codecache import torch_key

    assert system.torch_key_hex(None) == torch_key().hex()


def test_torchs_key_is_remembered_and_a_broken_memory_mended(tmp_path: Path) -> None:
    key = system.torch_key_hex(tmp_path)
    assert system.torch_key_hex(None) == key
    [memory] = (tmp_path / "v1" / "facts").iterdir()
    intact = memory.read_bytes()
    assert intact.decode().partition("\n")[2] == key
    # What is remembered is what is answered.
    facts.remember(tmp_path, memory.name, "0" * 64)
    assert system.torch_key_hex(tmp_path) == "0" * 64
    for broken in (b"", key.encode(), b"\xff\xfe", intact[:-1], intact.replace(b"\n", b"\n0", 1)):
        memory.write_bytes(broken)
        assert system.torch_key_hex(tmp_path) == key
        assert memory.read_bytes() == intact


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert system.torch_key_hex(in_the_way) == system.torch_key_hex(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(cache: Path) -> None:
    with pytest.raises(VllmcError) as caught:
        factors_of(cache, CompileSpec(device="cuda"))
    assert caught.value.code == "no-device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_brings_its_own_factors(cache: Path, plain: tuple[Factor, ...]) -> None:
    spec = CompileSpec(device="cuda")
    factors = factors_of(cache, spec)
    assert named(factors, "system", "device_multiprocessors").value
    brought = {f.identity for f in factors} - {f.identity for f in plain}
    assert brought == {*GPU_FACTORS, *(("environment", name) for name in CUDA_ENVIRONMENT)}
    assert key_of(factors) != key_of(plain)
    assert key_of(factors_of(cache, spec, TRITON_INTERPRET="1")) != key_of(factors)


def test_a_cpu_features_factor_is_narrow_only_under_a_fixed_level() -> None:
    if system.portable_march() is None:
        pytest.skip("levels are those of x86-64")
    every = set(system.cpu_features(march=None))
    some = set(system.cpu_features(march=system.portable_march()))
    assert some < every
    assert every == set(system.cpu_features(march="native"))
    # What Inductor's own flags switch on must be among them.
    assert {f for f in every if f.startswith(("avx512_bf16", "avx512_vnni", "amx"))} <= some


def test_vllmcs_own_code_is_a_factor_per_package(
    cache: Path,
    plain: tuple[Factor, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = importlib.import_module("vllmc.core")
    copy = tmp_path / "core"
    shutil.copytree(package.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(package, "__path__", [str(copy)])

    def changed() -> list[str]:
        before = {f.identity: f.digest for f in plain}
        return [f.name for f in factors_of(cache) if before[f.identity] != f.digest]

    assert changed() == []
    for name, file in (
        ("core.graph", "graph/a_new_pass.py"),
        ("core.compiler", "compiler/__init__.py"),
        ("core.models", "models/sub/deep.py"),
        ("core.torch_compat", "torch_compat/config.py"),
        ("core.runtime", "runtime/loader_new.py"),
    ):
        path = copy / file
        path.parent.mkdir(exist_ok=True)
        before = path.read_text() if path.exists() else None
        path.write_text((before or "") + "\n# changed\n")
        assert changed() == [name]
        path.unlink() if before is None else path.write_text(before)
    # What only stores, explains or shows shapes no program.
    for file in ("cache/store.py", "errors.py", "runtime/engine.py"):
        (copy / file).write_text("changed")
    assert changed() == []


def test_a_unit_depends_on_neither_model_nor_capture(
    cache: Path, plain: tuple[Factor, ...]
) -> None:
    unit = unit_factors(plain)
    assert all(factor in plain for factor in unit)
    groups = {factor.group for factor in unit}
    assert groups == {factor.group for factor in plain} - {"dynamo", "model"}
    names = {factor.identity for factor in unit}
    assert {("versions", "torch_key"), ("code", "core.torch_compat"), ("spec", "dtype")} <= names
    # Generated code calls vllmc's ops.
    assert ("code", "kernels") in names
    for absent in (
        ("versions", "transformers"),
        ("code", "core.models"),
        ("spec", "ranges"),
        ("spec", "sizes"),
        ("spec", "layer_names"),
        ("spec", "experts"),
    ):
        assert absent not in names
    ranges = CompileSpec(ranges=(CompileRange(1, 7),), layer_names="baked", experts="grouped_mm")
    assert key_of(unit_factors(factors_of(cache, ranges))) == key_of(unit)
    option = CompileSpec(functorch=(("cse", False),))
    assert key_of(unit_factors(factors_of(cache, option))) != key_of(unit)


def test_passes_are_factors_of_a_unit(plain: tuple[Factor, ...]) -> None:
    fused = Factor(group="passes", name="rms_norm_quant", value="1")
    assert fused in unit_factors((*plain, fused))


def test_two_threads_take_factors_under_their_own_options(cache: Path) -> None:
    specs = [CompileSpec(inductor=(("cpp.threads", n),)) for n in (3, 5)]
    alone = [key_of(factors_of(cache, spec)) for spec in specs]
    together: dict[int, list[str]] = {0: [], 1: []}
    start = threading.Barrier(2, timeout=60)

    def work(index: int) -> None:
        start.wait()
        together[index] = [key_of(factors_of(cache, specs[index])) for _ in range(5)]

    workers: list[Any] = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert together == {0: [alone[0]] * 5, 1: [alone[1]] * 5}
    assert alone[0] != alone[1]
