"""Model families: what vllmc generates with a tiny model of each, against Transformers itself."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from repeating import plans, told

from vllmc.core.errors import VllmcError
from vllmc.core.graph import capture as capturing
from vllmc.core.graph.capture import Capture
from vllmc.core.graph.inputs import find_attribute
from vllmc.core.job import Job
from vllmc.core.pipeline import Ready, open_program
from vllmc.core.runtime.engine import Engine, EngineConfig, Step
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.kernels.kv_cache import KVCacheSpec
from vllmc.kernels.layer_name import LayerName


def _load_families() -> Any:
    path = Path(__file__).parent / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up by name.
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


with warnings.catch_warnings():
    # torch.utils.mkldnn, which Dynamo imports, uses what torch itself deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    families = _load_families()
    import torch.utils.mkldnn


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A family's program, the whole graph that it was cut from, and what it should generate."""

    name: str
    job: Job
    ready: Ready
    captured: Capture
    graph: fx.GraphModule
    expected: tuple[tuple[int, ...], ...]
    first_without_context: tuple[int, ...]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models so small are run in a fraction of the time by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# One family of each kind by default; the others differ from it in what takes a line or two.
EACH_FAMILY = tuple(
    pytest.param(family, id=family.name, marks=() if family.core else pytest.mark.thorough)
    for family in families.FAMILIES
)


COMPILED = {"llama", "gemma2", "gpt2", "qwen3_moe"}
TRACED = {"llama", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3", "smollm3"}
"""Of which Inductor's code is run by default, and in how few layers are traced."""


@pytest.fixture(scope="module", params=EACH_FAMILY)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    place = tmp_path_factory.mktemp(request.param.name)
    model = families.make_model(request.param)
    model.save_pretrained(place / "model")
    job = families.job_of(place / "model", place / "cache")
    capture = capturing.capture
    seen: list[tuple[Capture, fx.GraphModule]] = []

    def capture_and_keep(*args: Any) -> Capture:
        captured = capture(*args)
        # Its code is written here, before the graph is cut.
        seen.append((captured, fx.GraphModule({}, captured.graph)))
        return captured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capturing, "capture", capture_and_keep)
        ready = families.obtain(job, place / "cache")
    ((captured, graph),) = seen
    return Compiled(
        name=request.param.name,
        job=job,
        ready=ready,
        captured=captured,
        graph=graph,
        expected=tuple(families.continuation(model, prompt) for prompt in families.PROMPTS),
        first_without_context=tuple(
            families.continuation(model, prompt[-1:])[0] for prompt in families.PROMPTS
        ),
    )


def test_token_ids_are_those_of_transformers(compiled: Compiled) -> None:
    generated = families.generated(compiled.job, compiled.ready)
    assert generated == {n: compiled.expected[:n] for n in families.BATCHES}


def test_what_is_generated_hangs_on_the_context_and_varies(compiled: Compiled) -> None:
    """Else equal ids would prove nothing about attention, caches and positions."""
    firsts = [ids[0] for ids in compiled.expected]
    alone = compiled.first_without_context
    assert sum(a != b for a, b in zip(firsts, alone, strict=True)) >= 3
    assert len({token for ids in compiled.expected for token in ids}) >= 10


class Recorded:
    """A step that keeps the logits that it returned."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.logits: list[torch.Tensor] = []

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        self.logits.append(self.step(*args))
        return self.logits[-1]


def whole_graph(compiled: Compiled, entry: torch.nn.Module) -> Step:
    """The captured graph, run as it is."""

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": ids, "position_ids": positions, "logits_indices": rows}
        values = {
            "activation": lambda i: given[i.name],
            "size": lambda i: given[i.name].shape[i.dim],
            "attribute": lambda i: find_attribute(entry, i.name),
            "layer-name": lambda i: LayerName(i.name),
        }
        (logits,) = compiled.graph(*(values[i.kind](i) for i in compiled.captured.inputs))
        return logits

    return step


def test_the_split_graph_computes_what_the_graph_does(compiled: Compiled) -> None:
    entry = families.entry_of(compiled.job)
    program = open_program(compiled.ready, entry)
    steps = Recorded(program), Recorded(whole_graph(compiled, entry))
    for step in steps:
        engine = Engine(
            step,
            [
                KVCacheSpec(
                    layer_name=site.layer,
                    num_kv_heads=site.kv_heads,
                    key_size=site.key_size,
                    value_size=site.value_size,
                )
                for site in compiled.captured.attention
            ],
            EngineConfig(
                vocab_size=families.VOCAB,
                max_position=None,
                max_tokens_per_step=40,
                num_blocks=32,
            ),
            program.experts,
        )
        engine.generate(families.PROMPTS, SamplingParams(max_new_tokens=3))
    split, whole = (step.logits for step in steps)
    assert len(split) > 3, "prompts were prefilled in chunks, then decoded"
    torch.testing.assert_close(split, whole, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=() if f.name in COMPILED else pytest.mark.thorough)
        for f in families.FAMILIES
        if f.core
    ],
)
def test_token_ids_are_those_of_transformers_when_compiled(family: Any, tmp_path: Path) -> None:
    model = families.make_model(family)
    model.save_pretrained(tmp_path / "model")
    job = families.job_of(tmp_path / "model", tmp_path / "cache", "inductor")
    generated = families.generated(job, families.obtain(job, tmp_path / "cache"))
    expected = tuple(families.continuation(model, prompt) for prompt in families.PROMPTS)
    assert generated == {n: expected[:n] for n in families.BATCHES}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_on_transformers_own_op_generate_the_same(name: str, tmp_path: Path) -> None:
    family = next(f for f in families.FAMILIES if f.name == name)
    model = families.make_model(family)
    model.save_pretrained(tmp_path / "model")
    job = families.job_of(tmp_path / "model", tmp_path / "cache", experts="grouped_mm")
    ready = families.obtain(job, tmp_path / "cache")
    assert ready.record.program["experts"] == []
    expected = tuple(families.continuation(model, prompt) for prompt in families.PROMPTS)
    assert families.generated(job, ready) == {n: expected[:n] for n in families.BATCHES}


# jetmoe does not let its experts be exchanged.
MIXTURES = {f.name for f in families.FAMILIES if any("experts" in field for field in f.config)} - {
    "jetmoe"
}


def test_mixtures_run_on_one_op_a_layer_that_finds_its_experts(compiled: Compiled) -> None:
    names = [site.layer for site in compiled.captured.experts]
    calls = [n for n in compiled.captured.graph.nodes if "fused_moe" in str(n.target)]
    weights = {tensor.name for site in compiled.captured.experts for tensor in site.tensors}
    assert len(calls) == len(names) == len({*names})
    assert weights.isdisjoint(given.name for given in compiled.captured.inputs)
    assert (len(names) > 0) == (compiled.name in MIXTURES)


@pytest.mark.parametrize("refusal", families.REFUSED, ids=lambda family: family.name)
def test_what_cannot_be_captured_is_refused_with_module_and_line(
    refusal: Any, tmp_path: Path
) -> None:
    families.save_config(refusal, tmp_path / "model")
    with pytest.raises(VllmcError) as caught:
        families.obtain(families.job_of(tmp_path / "model", tmp_path / "cache"), tmp_path / "cache")
    error = caught.value
    assert error.code == "unsupported-model"
    assert refusal.says in error.message
    assert error.context.get("module", "") == refusal.module
    if refusal.module:
        assert re.fullmatch(r"transformers/\S+\.py:[1-9]\d*", str(error.context["line"]))
        assert error.context["source"]


# Values decide how many rows an expert gets; or the only two layers differ.
TRACED_WHOLE = {"jetmoe", "gemma3n_text", "gemma4_text", "smollm3"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=() if f.name in TRACED else pytest.mark.thorough)
        for f in families.FAMILIES
    ],
)
def test_tracing_equal_layers_once_gives_the_graph_of_tracing_all(
    family: Any, tmp_path: Path
) -> None:
    families.save_config(family, tmp_path)
    repeating, whole, stood_in = plans(str(tmp_path))
    assert told(repeating) == told(whole)
    assert (stood_in > 0) == (family.name not in TRACED_WHOLE)
