"""Which compiled pieces a batch runs on, by its number of tokens, with a real model's pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllmc.core.cache.store import Store
from vllmc.core.compiler.container import unpack
from vllmc.core.errors import VllmcError
from vllmc.core.events import SilentObserver
from vllmc.core.job import make_job
from vllmc.core.models.resolve import resolve
from vllmc.core.pipeline import Ready, obtain_program, open_program
from vllmc.core.runtime.engine import Engine, EngineConfig
from vllmc.core.runtime.program import Program
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.kernels.kv_cache import KVCacheSpec

VOCAB = 128
NEW_TOKENS = 6
PROMPTS = tuple(
    torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (21, 1, 7, 2)
)
KINDS = ("unbacked", "backed", "backed-size-oblivious")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A compiled program, and the counts of tokens of the batches that it was given."""

    ready: Ready
    program: Program
    batches: list[int]

    def step(self, *args: torch.Tensor) -> torch.Tensor:
        self.batches.append(args[0].shape[1])
        return self.program(*args)

    def generate(self, prompts: Sequence[Sequence[int]], **limits: Any) -> list[tuple[int, ...]]:
        """The greedy token ids of `prompts`, in batches of as many tokens as the program takes."""
        fields: dict[str, Any] = {
            "vocab_size": VOCAB,
            "max_position": 128,
            "max_tokens_per_step": self.program.max_tokens,
            "token_counts": self.program.ranges,
            "num_blocks": 32,
        }
        specs = [
            KVCacheSpec(
                layer_name=site.layer,
                num_kv_heads=site.kv_heads,
                key_size=site.key_size,
                value_size=site.value_size,
            )
            for site in self.program.layout.attention
        ]
        engine = Engine(self.step, specs, EngineConfig(**(fields | limits)))
        result = engine.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS))
        return [output.token_ids for output in result.outputs]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # Large, so that tokens hang on attention and no two logits are close.
        initializer_range=0.4,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def expected(llama: LlamaForCausalLM) -> list[tuple[int, ...]]:
    """What Transformers' own `generate` continues each prompt with."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(tuple(output[0, len(prompt) :].tolist()))
    return found


@pytest.fixture(scope="module")
def compiled(
    llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Subject]:
    """Compiles the model for ranges as text, with changes of the spec; the eager backend's code."""
    directory = tmp_path_factory.mktemp("dispatch")
    llama.save_pretrained(directory / "model")
    store = Store(directory / "cache")

    def compile_for(*ranges: str, **changes: Any) -> Subject:
        fields: dict[str, Any] = {
            "ranges": tuple(CompileRange.parse(text) for text in ranges),
            "backend": "eager",
        }
        job = make_job(
            resolve(str(directory / "model")),
            CompileSpec(**(fields | changes)),
            environment={},
            cache_dir=directory / "facts",
            origins={},
        )
        ready = obtain_program(job, store, SilentObserver())
        entry = job.model.build("real", job.spec)
        return Subject(ready=ready, program=open_program(ready, entry), batches=[])

    return compile_for


def symbolic(ready: Ready) -> dict[str, list[bool]]:
    """By range, whether Inductor's code for each unique piece allocates by a symbolic size."""
    found: dict[str, list[bool]] = {}
    for unit in ready.units:
        lines = unpack(unit.data).text("wrapper.py").splitlines()
        allocations = [line for line in lines if " = empty_strided" in line]
        assert allocations
        found.setdefault(unit.range, []).append(
            any(re.search(r"\b[us]\d+\b", line) for line in allocations)
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_one_token_run_on_a_static_graph_again_and_again(
    compiled: Callable[..., Subject], expected: list[tuple[int, ...]], kind: str
) -> None:
    subject = compiled("1:1", backend="inductor", dynamic_shapes=kind)
    assert symbolic(subject.ready) == {"1": [False, False, False]}
    assert subject.generate(PROMPTS) == expected
    assert subject.generate(PROMPTS) == expected
    assert set(subject.batches) == {1}
    assert [str(r) for r in subject.program.ranges] == ["1"]


@pytest.mark.slow
def test_a_size_within_a_range_has_static_code_of_its_own(
    compiled: Callable[..., Subject], expected: list[tuple[int, ...]]
) -> None:
    subject = compiled("2:16", backend="inductor", sizes=(1, 7))
    assert symbolic(subject.ready) == {
        "1": [False, False, False],
        "7": [False, False, True],
        "2:16": [True, True, True],
    }
    variant = subject.program.variant
    assert len({id(variant(n)) for n in (1, 7, 2)}) == 3
    assert variant(2) is variant(6) is variant(8) is variant(16)
    # Prompts of 21, 1, 7 and 2 tokens: their prefills, then decodes, of one sequence at a time.
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert subject.generate([prompt], max_tokens_per_step=7) == [ids]
    assert {7, 2, 1} <= set(subject.batches)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_prompt_run_on_the_ranges_that_hold_them(
    compiled: Callable[..., Subject], expected: list[tuple[int, ...]], kind: str
) -> None:
    subject = compiled("1:1", "2:4", "5:8", dynamic_shapes=kind)
    variants = [subject.program.variant(n) for n in range(1, 9)]
    assert [variants.index(v) + 1 for v in variants] == [1, 2, 2, 2, 5, 5, 5, 5]
    assert subject.generate(PROMPTS[:1]) == expected[:1]
    assert subject.batches == [8, 8, 5, 1, 1, 1, 1, 1]
    assert subject.generate(PROMPTS) == expected
    assert {2, 3, 4} & set(subject.batches)


@pytest.mark.parametrize("tokens", [3, 4, 7, 9, 17, 1000])
def test_a_batch_that_no_range_or_size_holds_is_refused_by_their_names(
    compiled: Callable[..., Subject], tokens: int
) -> None:
    program = compiled("1:2", "5:6", sizes=(8, 16)).program
    ids = torch.ones(1, tokens, dtype=torch.int64)
    with pytest.raises(VllmcError, match=rf"\b{tokens} tokens") as caught:
        program(ids, ids, torch.zeros(1, dtype=torch.int64))
    assert caught.value.code == "size-out-of-range"
    assert caught.value.context["ranges"] == ["1:2", "5:6", "8", "16"]


def test_prompts_that_fall_between_ranges_run_in_parts_that_fit(
    compiled: Callable[..., Subject], expected: list[tuple[int, ...]]
) -> None:
    subject = compiled("1:2", "7:9")
    assert subject.generate(PROMPTS) == expected
    assert set(subject.batches) <= {1, 2, 7, 8, 9}
    with pytest.raises(VllmcError) as caught:
        compiled("7:9").generate([[1, 2, 3]])
    assert caught.value.code == "size-out-of-range"


def test_no_tokens_are_refused(compiled: Callable[..., Subject]) -> None:
    program = compiled("1:8").program
    ids = torch.ones(1, 0, dtype=torch.int64)
    with pytest.raises(VllmcError) as caught:
        program(ids, ids, torch.zeros(1, dtype=torch.int64))
    assert caught.value.code == "zero-tokens"
