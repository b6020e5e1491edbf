"""The engine with the eager Transformers model as its step, against `model.generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllmc.core.errors import VllmcError
from vllmc.core.models.attention import ATTENTION_NAME, attach_layer_names, register_attention
from vllmc.core.runtime.engine import Engine, EngineConfig, GenerationResult
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.kernels.kv_cache import KVCacheSpec, OutOfBlocksError

VOCAB = 128
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Large, so that the choice of a token hangs on attention and no two logits are close.
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": 5},
    "gemma2": {
        **COMMON,
        "sliding_window": 5,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    "gpt_oss": {
        **COMMON,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Keys of 12, values of 8.
    "minicpm3": {
        **{k: v for k, v in COMMON.items() if k != "head_dim"},
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}
LENGTHS = (19, 1, 7, 33, 2, 12, 5)
PROMPTS = [
    torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(i)).tolist()
    for i, n in enumerate(LENGTHS)
]
NEW_TOKENS = 10


@dataclass(frozen=True)
class Subject:
    """A model that attends through the op, and the same one attending as Transformers does."""

    served: Any
    eager: Any
    specs: tuple[KVCacheSpec, ...]

    def step(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.served(
            input_ids=ids, position_ids=positions, logits_to_keep=rows, use_cache=False
        ).logits[0]
        return logits

    def expected(self, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> tuple[int, ...]:
        ids = torch.tensor([prompt])
        out = self.eager.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        return tuple(out[0, len(prompt) :].tolist())

    def engine(self, step: Callable[..., torch.Tensor] | None = None, **limits: Any) -> Engine:
        config = {
            "vocab_size": VOCAB,
            "max_position": 128,
            "max_tokens_per_step": 512,
            "num_blocks": 64,
            "block_size": 4,
        }
        return Engine(step or self.step, self.specs, EngineConfig(**{**config, **limits}))


def build(family: str) -> Subject:
    register_attention()
    models = []
    for attention in (ATTENTION_NAME, "eager"):
        torch.manual_seed(1)
        config = AutoConfig.for_model(family, **FAMILIES[family])
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for name, parameter in model.named_parameters():
            # Not all families draw these at random.
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        models.append(model.eval().requires_grad_(False))
    names = attach_layer_names(models[0], "hoisted")
    fields = FAMILIES[family]
    key_size, value_size = (12, 8) if family == "minicpm3" else (8, 8)
    specs = tuple(
        KVCacheSpec(
            layer_name=name,
            num_kv_heads=fields.get("num_key_value_heads", 4),
            key_size=key_size,
            value_size=value_size,
        )
        for name in names
    )
    return Subject(served=models[0], eager=models[1], specs=specs)


@pytest.fixture(scope="module", params=list(FAMILIES))
def subject(request: pytest.FixtureRequest) -> Subject:
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> Subject:
    return build("llama")


def token_ids(result: GenerationResult) -> list[tuple[int, ...]]:
    return [output.token_ids for output in result.outputs]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_tokens_per_step": 8},
        {"max_tokens_per_step": 1},
        {"num_blocks": 22},
        {"num_blocks": 13, "max_tokens_per_step": 5},
    ],
    ids=["one step", "chunks", "token by token", "waiting", "waiting and chunks"],
)
def test_greedy_tokens_equal_those_of_transformers(
    subject: Subject, limits: dict[str, int]
) -> None:
    expected = [subject.expected(prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS), "the model does not look at its prompt"
    engine = subject.engine(**limits)
    for count in (1, 2, 7):
        result = engine.generate(PROMPTS[:count], SamplingParams(max_new_tokens=NEW_TOKENS))
        assert token_ids(result) == expected[:count]
        assert [o.prompt_ids for o in result.outputs] == [tuple(p) for p in PROMPTS[:count]]
        assert {o.finish_reason for o in result.outputs} == {"length"}


def test_a_step_never_exceeds_its_limit_and_mixes_prefill_with_decodes(llama: Subject) -> None:
    shapes = []

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        assert ids.shape == positions.shape
        assert ids.dtype == positions.dtype == rows.dtype == torch.int64
        shapes.append((ids.shape[1], rows.shape[0]))
        return llama.step(ids, positions, rows)

    engine = llama.engine(step, max_tokens_per_step=8)
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS))
    assert max(tokens for tokens, _ in shapes) == 8
    assert all(rows >= 1 for _, rows in shapes)
    # The 19 tokens of the first prompt take two full chunks, and the third step has room for more.
    assert [tokens for tokens, _ in shapes[:3]] == [8, 8, 8]
    assert shapes[3][1] >= 2


def test_finished_sequences_leave_the_batch(llama: Subject) -> None:
    expected = [llama.expected(prompt) for prompt in PROMPTS[:3]]
    stop = expected[0][2]
    sizes = []

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.shape[0])
        return llama.step(ids, positions, rows)

    params = SamplingParams(max_new_tokens=NEW_TOKENS, stop_token_ids=(stop,))
    result = llama.engine(step).generate(PROMPTS[:3], params)
    assert sizes[0] == 3
    assert sizes[3] < 3
    assert result.outputs[0].token_ids == expected[0][: expected[0].index(stop) + 1]


def test_a_stop_token_ends_its_sequence_and_is_part_of_it(subject: Subject) -> None:
    expected = [subject.expected(prompt) for prompt in PROMPTS]
    stop = (expected[0][4], expected[3][1])
    params = SamplingParams(max_new_tokens=NEW_TOKENS, stop_token_ids=stop)
    result = subject.engine(max_tokens_per_step=8).generate(PROMPTS, params)
    for output, full in zip(result.outputs, expected, strict=True):
        ends = [full.index(token) + 1 for token in stop if token in full]
        assert output.token_ids == full[: min(ends, default=NEW_TOKENS)]
        assert output.finish_reason == ("stop" if ends else "length")
    assert result.outputs[3].finish_reason == "stop"


def test_a_stop_token_is_passed_over_on_request(llama: Subject) -> None:
    expected = llama.expected(PROMPTS[0])
    params = SamplingParams(
        max_new_tokens=NEW_TOKENS, stop_token_ids=(expected[2],), ignore_eos=True
    )
    assert token_ids(llama.engine().generate(PROMPTS[:1], params)) == [expected]


def test_a_stop_token_as_the_last_one_is_a_stop(llama: Subject) -> None:
    first = llama.expected(PROMPTS[0])[0]
    params = SamplingParams(max_new_tokens=1, stop_token_ids=(first,))
    assert llama.engine().generate(PROMPTS[:1], params).outputs[0].finish_reason == "stop"


def test_no_new_tokens_run_nothing(llama: Subject) -> None:
    def step(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model ran")

    result = llama.engine(step).generate(PROMPTS[:2], SamplingParams(max_new_tokens=0))
    assert token_ids(result) == [(), ()]
    assert {o.finish_reason for o in result.outputs} == {"length"}
    assert result.timings.first_token_seconds == 0.0


def test_no_prompts_give_no_outputs(llama: Subject) -> None:
    assert llama.engine().generate([], SamplingParams(max_new_tokens=3)).outputs == ()


def test_an_engine_can_be_used_again_after_an_error(llama: Subject) -> None:
    calls = 0

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return llama.step(ids, positions, rows)

    engine = llama.engine(step, num_blocks=13)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS[3:4], SamplingParams(max_new_tokens=NEW_TOKENS))
    result = engine.generate(PROMPTS[3:4], SamplingParams(max_new_tokens=NEW_TOKENS))
    assert token_ids(result) == [llama.expected(PROMPTS[3])]


@pytest.mark.parametrize("max_tokens_per_step", [8, 512])
def test_every_token_is_computed_once(llama: Subject, max_tokens_per_step: int) -> None:
    engine = llama.engine(max_tokens_per_step=max_tokens_per_step)
    timings = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS)).timings
    assert timings.prefill_tokens == sum(LENGTHS)
    assert timings.decode_tokens == len(PROMPTS) * (NEW_TOKENS - 1)
    assert timings.prefill_seconds > 0
    assert timings.decode_seconds > 0
    assert 0 < timings.first_token_seconds <= timings.prefill_seconds + timings.decode_seconds


def test_sampling_repeats_with_its_seed(llama: Subject) -> None:
    def sample(seed: int) -> list[tuple[int, ...]]:
        params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=0.95, seed=seed)
        return token_ids(llama.engine().generate(PROMPTS, params))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_each_generated_token_has_its_logprobs(llama: Subject) -> None:
    params = SamplingParams(max_new_tokens=4, logprobs=3)
    engine = llama.engine(max_tokens_per_step=8)
    for output in engine.generate(PROMPTS[:3], params).outputs:
        ids = torch.tensor([output.prompt_ids + output.token_ids])
        logprobs = llama.eager(input_ids=ids).logits[0].log_softmax(dim=-1)
        assert output.logprobs is not None
        assert len(output.logprobs) == 4
        for index, entry in enumerate(output.logprobs):
            row = logprobs[len(output.prompt_ids) + index - 1]
            assert entry.token_id == output.token_ids[index]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "code", "says"),
    [
        ([[1, 2], []], 4, "empty-prompt", "prompt 1"),
        ([[1, VOCAB]], 4, "bad-token-id", str(VOCAB)),
        ([[-1]], 4, "bad-token-id", "-1"),
        ([[1] * 120], 9, "prompt-too-long", "120 tokens.* 9 new .*128"),
        ([[1] * 129], 0, "prompt-too-long", "129 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_named(
    llama: Subject, prompts: list[list[int]], new_tokens: int, code: str, says: str
) -> None:
    with pytest.raises(VllmcError, match=says) as caught:
        llama.engine().generate(prompts, SamplingParams(max_new_tokens=new_tokens))
    assert caught.value.code == code


def test_a_prompt_as_long_as_the_model_allows_runs(llama: Subject) -> None:
    prompt = (PROMPTS[3] * 4)[:124]
    result = llama.engine().generate([prompt], SamplingParams(max_new_tokens=4))
    assert token_ids(result) == [llama.expected(prompt, 4)]


def test_a_prompt_beyond_the_whole_cache_is_refused_at_once(llama: Subject) -> None:
    engine = llama.engine(num_blocks=2)
    with pytest.raises(OutOfBlocksError) as caught:
        engine.generate([PROMPTS[1], PROMPTS[3]], SamplingParams(max_new_tokens=4))
    assert caught.value.context == {"needed": 9, "free": 2}
    # 8 slots: the last of 8 + 1 tokens is never stored.
    result = engine.generate([PROMPTS[6] + [1, 2, 3]], SamplingParams(max_new_tokens=1))
    assert len(result.outputs[0].token_ids) == 1
