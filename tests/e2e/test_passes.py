"""Passes over quantised models: what they find, what remains in the code, and that it computes the
same."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_programs import PROMPT, Case, case_maker, job_of, logits, warm
from quantized_reference import logits_of, quantized

from vllmc.core.compiler.container import unpack
from vllmc.core.passes import PASSES, chosen, default_passes
from vllmc.core.pipeline import Ready
from vllmc.core.ranges import CompileRange
from vllmc.core.spec import LayerNames, Quantization
from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.minors.torch_2_13 import Torch213

pytestmark = pytest.mark.slow

ACTIVATIONS = {"llama": "silu", "qwen3": "silu", "gemma": "gelu"}
EXAMPLES = (("llama", "fp8-static"), ("gemma", "int8-dynamic"))
"""Models and modes of the default run."""
UNFUSED = chosen(["shared-quant"], ["all"], "cpu")
"""What is fused is compared with the same ops one after the other."""
FUSED = default_passes("cuda")
EXPANDED = default_passes("cpu")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    return case_maker(tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that what was compiled for one test is there for the next."""
    return tmp_path_factory.mktemp("cache")


def matches(ready: Ready) -> dict[str, int]:
    return {report.name: report.matches for report in ready.passes}


def calls(code: str) -> list[str]:
    """The names of vllmc's ops that the code calls, in their order."""
    lines = [line for line in code.splitlines() if "= torch.ops.vllmc." in line]
    return [line.partition("torch.ops.vllmc.")[2].partition(".")[0] for line in lines]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *EXAMPLES,
        *(
            pytest.param(name, mode, marks=pytest.mark.thorough)
            for name in ACTIVATIONS
            for mode in ("fp8-static", "fp8-dynamic", "int8-dynamic")
            if (name, mode) not in EXAMPLES
        ),
    ],
)
def test_a_fused_model_gives_the_logits_of_the_unfused_one(
    name: str, mode: Quantization, case: Any, cache: Path
) -> None:
    given = case(name, "float32")
    plain = job_of(given, cache, quantize=mode, passes=UNFUSED)
    expected = logits(plain, warm(plain, cache))
    for passes, kind in ((FUSED, "hoisted"), (FUSED, "baked"), (EXPANDED, "hoisted")):
        job = job_of(given, cache, quantize=mode, layer_names=kind, passes=passes)
        ready = warm(job, cache)
        found = logits(job, ready)
        # A number in the middle of two may be taken for either.
        assert (found - expected).norm() <= 0.02 * expected.norm()
        top = expected.topk(2).values
        certain = top[:, 0] - top[:, 1] > 2 * (found - expected).abs().max()
        assert certain.sum() > len(expected) / 2
        assert torch.equal(found.argmax(1)[certain], expected.argmax(1)[certain])
        # The names are in none of the pieces, so that those of the one mode serve the other.
        assert kind == "hoisted" or ready.outcome == "hit"
        if passes is EXPANDED:
            # The kernels of Inductor's quantise: of all ops the products are left.
            for unit in ready.units:
                left = set(calls(unpack(unit.data).text("wrapper.py")))
                assert left == {"scaled_mm"}


def test_in_half_precision_a_fused_model_is_as_near_to_the_exact_one(
    case: Any, cache: Path
) -> None:
    given = case("llama", "bfloat16")
    with quantized(given.model, "fp8-static", given.scales):
        expected = logits_of(given.model, PROMPT)
    away = {}
    for fused in (True, False):
        passes = FUSED if fused else UNFUSED
        job = job_of(given, cache, quantize="fp8-static", passes=passes)
        away[fused] = float((logits(job, warm(job, cache)) - expected).norm())
    assert away[True] <= 1.5 * away[False]


def test_every_layer_is_fused_by_the_same_few_matches(case: Any, tmp_path: Path) -> None:
    given = case("llama", "float32")
    fused: dict[str, Any] = {"quantize": "fp8-static", "passes": FUSED}
    few = warm(job_of(given, tmp_path, layers=2, **fused), tmp_path)
    job = job_of(given, tmp_path, layers=12, **fused)
    many = warm(job, tmp_path, texts=True)
    for ready, layers in ((few, 2), (many, 12)):
        found = matches(ready)
        assert ready.record.pieces["unique"] == 3
        # Of the whole graph: queries, keys and values are quantised once, and gate and up.
        assert (found["shared-quant"], found["attention-quant"]) == (3 * layers, layers)
        # Of the unique pieces: the first, one in the middle, the last.
        assert (found["norm-quant"], found["activation-quant"]) == (4, 2)
    baked = job_of(given, tmp_path, layers=12, layer_names="baked", **fused)
    ready = warm(baked, tmp_path)
    assert ready.outcome == "hit"
    assert matches(ready) == {"shared-quant": 36, "attention-quant": 12}


@pytest.mark.parametrize(("names", "unique"), [("hoisted", 3), ("baked", 5)])
def test_names_inside_pieces_are_matched_once_for_each_layer_that_they_make_unique(
    names: LayerNames, unique: int, case: Any, tmp_path: Path
) -> None:
    job = job_of(
        case("llama", "float32"), tmp_path, layers=4, quantize="fp8-static", layer_names=names,
        split_kv_update=True, passes=FUSED,
    )  # fmt: skip
    ready = warm(job, tmp_path)
    assert ready.record.pieces["unique"] == unique
    found, middle = matches(ready), unique - 2
    assert (found["norm-quant"], found["activation-quant"]) == (2 * middle + 2, middle + 1)
    assert found["attention-quant"] == 4


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("qwen3", marks=pytest.mark.thorough), "gemma"]
)
def test_the_code_of_a_piece_is_the_fused_ops_with_nothing_between(
    name: str, case: Any, cache: Path
) -> None:
    # Compiled by the test above, and read here as it is stored.
    job = job_of(case(name, "float32"), cache, quantize="fp8-static", layers=3, passes=FUSED)
    stored = {unit.pieces[0]: unpack(unit.data) for unit in warm(job, cache).units}
    middle = stored["piece_2"].text("wrapper.py")
    assert calls(middle) == [
        "scaled_mm",
        "fused_add_rms_norm_static_quant",
        "scaled_mm",
        "scaled_mm",
        f"{ACTIVATIONS[name]}_and_mul_static_quant",
        "scaled_mm",
        "fused_add_rms_norm_static_quant",
        "scaled_mm",
        "scaled_mm",
        "scaled_mm",
    ]
    lines = middle.splitlines()
    ops = [number for number, line in enumerate(lines) if "= torch.ops.vllmc." in line]
    computed = [
        line for line in lines[ops[0] : ops[7]] if "empty_strided" in line or "cpp_" in line
    ]
    assert computed == []
    # Attention fills memory of 8 bits an element, and the next piece reads it as it is.
    assert "torch.float8_e4m3fn)" in middle


@pytest.mark.parametrize("names", ["hoisted", "baked"])
def test_attention_inside_a_piece_fills_its_output_where_it_is(
    names: LayerNames, case: Any, tmp_path: Path
) -> None:
    job = job_of(
        case("llama", "float32"), tmp_path, quantize="fp8-static", layer_names=names,
        splitting_ops=("vllmc::dynamic_scaled_quant", "torch.nn.functional.silu"),
    )  # fmt: skip
    ready = warm(job, tmp_path)
    assert matches(ready)["attention-quant"] == 2
    held = [unpack(unit.data).text("wrapper.py") for unit in ready.units]
    held = [code for code in held if "unified_attention" in code]
    assert held
    for code in held:
        (line,) = (x for x in code.splitlines() if "torch.ops.vllmc.unified_attention" in x)
        call = ast.parse(line.strip()).body[0]
        assert isinstance(call, ast.Expr)
        assert isinstance(call.value, ast.Call)
        output = ast.unparse(call.value.args[3])
        before = code[: code.index(line)]
        # Nothing is done with it but to allocate it.
        assert re.findall(rf"\b{output}\b.*", before) == re.findall(
            rf"\b{output} = empty_strided_cpu.*float8_e4m3fn\)", before
        )
        assert f"{output} = empty_strided_cpu" in before
    assert torch.isfinite(logits(job, ready)).all()


def test_a_pass_may_be_limited_to_compile_ranges(case: Any, tmp_path: Path) -> None:
    job = job_of(
        case("llama", "float32"), tmp_path, layers=2, quantize="fp8-static",
        ranges=(CompileRange(1, 8), CompileRange(9, 64)),
        passes=chosen(["norm-quant@1:8"], [], "cuda"),
    )  # fmt: skip
    ready = warm(job, tmp_path, texts=True)
    fused = {
        (unit.pieces[0], unit.range): "rms_norm_static_quant" in dict(unit.texts)["code.py"]
        for unit in ready.units
    }
    assert {range for (_, range), found in fused.items() if found} == {"1:8"}
    assert {range for _, range in fused} == {"1:8", "9:64"}
    assert torch.isfinite(logits(job, ready)).all()


def test_a_pass_that_finds_nothing_says_where_it_failed(case: Any, tmp_path: Path) -> None:
    # Each projection quantises for itself, so that three ops read what the norm gives.
    job = job_of(
        case("llama", "float32"), tmp_path, quantize="fp8-static",
        passes=chosen([], ["shared-quant"], "cuda"),
    )  # fmt: skip
    (told,) = (r for r in warm(job, tmp_path).passes if r.name == "norm-quant")
    assert told.matches == 0
    assert told.missed is not None
    assert told.missed.graph.startswith("piece_")
    assert told.missed.expected == "nothing else to read it"
    assert "static_scaled_quant" in told.missed.found


def test_warm_shows_the_passes_and_dumps_what_they_changed(vllmc: Any, workplace: Path) -> None:
    words = ("warm", "--quantize", "fp8-static", "--compile-range", "1:16", "--pass", "all")
    first = vllmc(*words, "--json").json
    assert [row["name"] for row in first["passes"]] == [*PASSES]
    left = {row["name"] for row in first["passes"] if not row["matches"]}
    # Of what is quantised the others leave nothing, and capture no no-ops from torch 2.14.
    assert left == {"expand-quant", *(() if isinstance(TORCH, Torch213) else ("no-ops",))}
    assert all(row["missed"] is None for row in first["passes"])
    assert vllmc(*words, "--json").json["passes"] == []
    assert "norm-quant" in vllmc(*words, "-v", "--dump", "dump").out
    texts = {}
    for piece in ("piece_0", "piece_2", "piece_4"):
        for name in ("before", "after", "code"):
            text = (workplace / "dump" / piece / "1-16" / f"{name}.py").read_text()
            compile(text, piece, "exec")
            texts[piece, name] = text
    for piece in ("piece_0", "piece_2", "piece_4"):
        assert "vllmc.static_scaled_quant" in texts[piece, "before"]
        assert "vllmc.static_scaled_quant" not in texts[piece, "after"]
        assert "rms_norm_static_quant" in texts[piece, "after"]
        assert "rms_norm_static_quant" in texts[piece, "code"]
    refused = vllmc("warm", "--check", "--dump", "other")
    assert (refused.code, refused.error) == (2, "bad-value")
    (workplace / "taken").touch()
    refused = vllmc("warm", "--backend", "eager", "--dump", "taken")
    assert (refused.code, refused.error) == (1, "not-writable")


def test_proving_a_pass_says_whether_it_changes_code(vllmc: Any, workplace: Path) -> None:
    words = ("inspect-key", "--quantize", "fp8-dynamic", "--compile-range", "1:16", "--json")
    (workplace / "with.json").write_text(vllmc(*words).out)
    (workplace / "without.json").write_text(vllmc(*words, "--no-pass", "expand-quant").out)
    done = vllmc("diff-config", "with.json", "without.json", "--prove", "tiny-llama", "--json").json
    (change,) = done["changes"]
    assert (change["group"], change["name"]) == ("passes", "expand-quant")
    assert change["restore"] == "leave out --no-pass expand-quant"
    (proved,) = done["proof"]["changes"]
    assert proved["code"] == "differs"
    assert proved["units"] == 3
