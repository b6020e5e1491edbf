"""Tiny models of many families, what Transformers itself generates with them, and what vllmc does.

Read by test_families.py and, to write docs/models.md, by scripts/gen_models_doc.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.job import Job, make_job, resolve_spec
from vllmc.core.models.resolve import resolve
from vllmc.core.pipeline import Ready, obtain_program, open_program
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import Limits, run_workload
from vllmc.core.spec import CompileSpec, ExpertsKind

VOCAB = 128
NEW_TOKENS = 8
# A window of 5 tokens ends within some of them, a block of 16 within others.
PROMPTS = tuple(
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (19, 1, 7, 33, 2, 12, 5)
)
BATCHES = (1, 2, 7)

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_HEADS = {**_COMMON, "head_dim": 8}
_ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
_ROPE = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny configuration. `core` marks those that the tests compile with Inductor as well."""

    name: str
    config: Mapping[str, Any]
    exercises: str
    core: bool = False

    @property
    def model_type(self) -> str:
        """What Transformers calls it."""
        return str(self.config["model_type"])


@dataclass(frozen=True, kw_only=True)
class Refusal(Family):
    """A tiny configuration that is refused: `module` is to be blamed (empty: the configuration)."""

    module: str
    says: str


def _refusal(
    name: str, exercises: str, fields: Mapping[str, Any], *, module: str, says: str, **more: Any
) -> Refusal:
    config = {"model_type": name, **fields, **more}
    return Refusal(name=name, config=config, exercises=exercises, module=module, says=says)


def _family(
    name: str, exercises: str, fields: Mapping[str, Any], *, core: bool = False, **more: Any
) -> Family:
    config = {"model_type": name, **fields, **more}
    return Family(name=name, config=config, exercises=exercises, core=core)


FAMILIES = (
    _family("llama", "grouped-query attention, RMSNorm, gated SiLU", _COMMON, core=True),
    _family(
        "llama-biased",
        "as many key heads as query heads, biases, tied embeddings",
        _COMMON,
        model_type="llama",
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    _family(
        "llama-3.1",
        "a single key head, scaled rotary frequencies",
        _COMMON,
        core=True,
        model_type="llama",
        num_key_value_heads=1,
        rope_parameters={
            **_ROPE,
            "rope_type": "llama3",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    _family(
        "llama-yarn",
        "YaRN, which scales attention too",
        _COMMON,
        model_type="llama",
        rope_parameters={**_ROPE, "rope_type": "yarn"},
    ),
    _family("mistral", "a sliding window in every layer", _HEADS, core=True, sliding_window=5),
    _family("ministral", "windows in some layers", {**_HEADS, **_ALTERNATING}),
    _family("qwen2", "biases of query, key and value", _COMMON, core=True),
    _family(
        "qwen2-window",
        "windows from some layer on",
        _COMMON,
        model_type="qwen2",
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    _family("qwen3", "norms of query and key heads", _HEADS, core=True),
    _family("gemma", "scaled and tied embeddings, gated GELU", _HEADS),
    _family(
        "gemma2",
        "soft-capped attention and logits, alternating windows, four norms a layer",
        {**_HEADS, **_ALTERNATING},
        core=True,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=8,
    ),
    _family(
        "gemma3_text",
        "other rotary frequencies in windowed layers, norms of query and key heads",
        {**_HEADS, **_ALTERNATING},
        core=True,
        query_pre_attn_scalar=8,
    ),
    _family(
        "gemma3",
        "the text half of a model that also sees",
        {
            "text_config": {**_HEADS, **_ALTERNATING, "query_pre_attn_scalar": 8},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_id": 127,
            "boi_token_id": 126,
            "eoi_token_id": 125,
        },
    ),
    _family(
        "gemma3n_text",
        "layers that attend to the keys of earlier ones, embeddings for each layer",
        _HEADS,
        core=True,
        num_hidden_layers=4,
        layer_types=_ALTERNATING["layer_types"] * 2,
        sliding_window=5,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=8,
        altup_num_inputs=2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    _family(
        "gemma4_text",
        "larger heads in full layers, embeddings for each layer",
        _HEADS,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=0,
        **_ALTERNATING,
    ),
    _family("phi", "parallel residual, partial rotary, LayerNorm, biases", _COMMON, core=True),
    _family("phi3", "fused projections, a sliding window", _COMMON, core=True, sliding_window=5),
    _family(
        "gpt_neox",
        "parallel residual, partial rotary, fused projection",
        {**_COMMON, "num_key_value_heads": None},
        core=True,
    ),
    _family("stablelm", "partial rotary, LayerNorm with gated SiLU", _COMMON),
    _family(
        "gpt2",
        "learned positions, transposed weights, tied embeddings",
        {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        core=True,
    ),
    _family(
        "gpt_bigcode",
        "learned positions, a single key head",
        {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    _family(
        "opt",
        "learned positions from an offset, ReLU",
        {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
        core=True,
    ),
    _family("biogpt", "learned positions from an offset, scaled embeddings", _COMMON),
    _family("persimmon", "squared ReLU, norms of query and key heads", _COMMON),
    _family("olmo", "norms without weights, clipped projections", _COMMON, clip_qkv=2.0),
    _family("olmo2", "norms after attention and feed-forward", _COMMON, core=True),
    _family("olmo3", "the same with windows", {**_COMMON, **_ALTERNATING}),
    _family("cohere", "parallel residual, logit scale, interleaved rotary", _COMMON, core=True),
    _family("cohere2", "the same; full layers without positions", {**_COMMON, **_ALTERNATING}),
    _family(
        "granite",
        "multipliers of embeddings, attention, residuals and logits",
        _COMMON,
        core=True,
        embedding_multiplier=2.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        logits_scaling=1.5,
    ),
    _family("starcoder2", "biases, LayerNorm, a sliding window", _COMMON, sliding_window=5),
    _family(
        "smollm3",
        "some layers without positions",
        _COMMON,
        core=True,
        no_rope_layers=[1, 0],
        no_rope_layer_interval=2,
    ),
    _family("nemotron", "squared ReLU, partial rotary, LayerNorm", _HEADS),
    _family("glm", "partial, interleaved rotary", _HEADS),
    _family("glm4", "the same with four norms a layer", _HEADS),
    _family("helium", "interleaved rotary", _HEADS),
    _family("exaone4", "norms after attention, windows", {**_HEADS, **_ALTERNATING}),
    _family("ernie4_5", "interleaved rotary", _HEADS),
    _family("seed_oss", "biases, a head size of its own", _HEADS),
    _family("arcee", "squared ReLU without gate", _HEADS),
    _family("apertus", "xIELU with learned parameters", _COMMON),
    _family("bitnet", "norms within attention and feed-forward", _COMMON),
    _family(
        "vaultgemma",
        "soft-capping with fewer norms",
        {**_HEADS, **_ALTERNATING},
        attn_logit_softcapping=3.0,
    ),
    _family("nanochat", "norms without weights, capped logits", _COMMON),
    _family("hunyuan_v1_dense", "norms of query and key after rotary", _HEADS),
    _family("internlm3", "biases everywhere", _HEADS, bias=True, qkv_bias=True),
    _family(
        "modernbert-decoder",
        "windows, other rotary frequencies in them",
        {**_COMMON, **_ALTERNATING},
        local_attention=10,
    ),
    _family(
        "minicpm3",
        "latent attention: keys larger than values; scaled depth",
        {**_LATENT, "v_head_dim": 8},
    ),
    _family(
        "mixtral",
        "mixture of experts, top 2",
        _COMMON,
        core=True,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    _family(
        "qwen2_moe",
        "experts beside a gated shared one",
        {**_COMMON, **_EXPERTS},
        shared_expert_intermediate_size=16,
    ),
    _family("qwen3_moe", "experts, norms of query and key", {**_HEADS, **_EXPERTS}, core=True),
    _family(
        "qwen3_next",
        "gated attention (no linear attention layers), experts",
        {**_HEADS, **_EXPERTS},
        layer_types=["full_attention"] * 2,
        shared_expert_intermediate_size=16,
    ),
    _family("olmoe", "experts, norms of query and key", {**_COMMON, **_EXPERTS}),
    _family("phimoe", "experts by sparse mixer, biases", _COMMON, num_local_experts=4),
    _family(
        "gpt_oss",
        "attention sinks, biased and clamped experts, alternating windows",
        {**_HEADS, **_ALTERNATING},
        core=True,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    _family(
        "deepseek_v2",
        "latent attention: keys and values of different size; grouped experts",
        {**_LATENT, **_ROUTED},
        topk_method="group_limited_greedy",
    ),
    _family(
        "deepseek_v3",
        "the same with sigmoid routing and its correction",
        {**_LATENT, **_ROUTED},
        core=True,
        head_dim=4,
    ),
    _family("glm4_moe", "grouped experts, a dense first layer", {**_HEADS, **_ROUTED}),
    _family("granitemoe", "experts with multipliers", _COMMON, num_local_experts=4),
    _family(
        "granitemoehybrid",
        "no positions at all (no Mamba layers), experts beside a shared one",
        {**_COMMON, **_MAMBA},
        layer_types=["attention", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
    ),
    _family(
        "ernie4_5_moe",
        "experts from some layer on",
        _COMMON,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
    ),
    _family(
        "minimax_m2",
        "partial rotary, experts",
        _HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    _family(
        "jetmoe",
        "experts for queries too, their sizes decided by the data",
        _COMMON,
        kv_channels=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
)

_OWN_ATTENTION = "0 of its 2 layers attend through Transformers' attention interface"
_LINEAR = "layer 0 is of the kind 'linear_attention'"

REFUSED = (
    _refusal(
        "bloom",
        "ALiBi in an attention of its own",
        _TOKENS,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        module="BloomAttention.forward",
        says=_OWN_ATTENTION,
    ),
    _refusal(
        "mpt",
        "ALiBi in an attention of its own",
        _TOKENS,
        d_model=32,
        n_heads=4,
        n_layers=2,
        module="MptAttention.forward",
        says=_OWN_ATTENTION,
    ),
    _refusal(
        "falcon",
        "an attention of its own",
        _TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        module="FalconAttention.forward",
        says=_OWN_ATTENTION,
    ),
    _refusal(
        "gptj",
        "an attention of its own",
        _TOKENS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        module="GPTJAttention.forward",
        says=_OWN_ATTENTION,
    ),
    _refusal(
        "gpt_neo",
        "an attention of its own",
        _TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        module="GPTNeoAttention.forward",
        says=_OWN_ATTENTION,
    ),
    _refusal(
        "bert",
        "an encoder that is to generate",
        _COMMON,
        architectures=["BertLMHeadModel"],
        module="",
        says="its configuration names BertLMHeadModel, and does not say is_decoder",
    ),
    _refusal(
        "bert-generation",
        "attention to later tokens",
        _COMMON,
        module="BertGenerationSelfAttention.forward",
        says="its attention is not causal",
    ),
    _refusal(
        "megatron-bert",
        "an encoder with an attention of its own",
        _COMMON,
        module="MegatronBertAttention.forward",
        says="0 of its 2 layers attend through Transformers' attention interface",
    ),
    _refusal(
        "deberta-v2",
        "an encoder with an attention of its own",
        _COMMON,
        module="",
        says="Transformers has no causal language model for DebertaV2Config, and it is no encoder",
    ),
    _refusal(
        "bart",
        "positions counted by the decoder",
        {
            **_TOKENS,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "is_encoder_decoder": False,
        },
        module="BartDecoder.forward",
        says="it counts the tokens of the batch",
    ),
    _refusal(
        "t5",
        "an encoder",
        _TOKENS,
        d_model=32,
        num_layers=2,
        num_heads=4,
        module="",
        says="T5Config is an encoder-decoder",
    ),
    _refusal("vit", "pictures", {}, module="", says="no causal language model for ViTConfig"),
    _refusal(
        "mamba",
        "state space layers",
        _TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        module="MambaBlock.forward",
        says=_LINEAR,
    ),
    _refusal(
        "jamba",
        "state space layers among attention",
        _COMMON,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        use_mamba_kernels=False,
        module="JambaMambaDecoderLayer.forward",
        says=_LINEAR,
    ),
    _refusal(
        "bamba",
        "state space layers among attention",
        {**_COMMON, **_MAMBA},
        attn_layer_indices=[1],
        module="BambaDecoderLayer.forward",
        says=_LINEAR,
    ),
    _refusal(
        "falcon_h1",
        "state space beside attention in every layer",
        {**_HEADS, **_MAMBA},
        mamba_d_ssm=64,
        module="FalconH1Attention.forward",
        says="layer 0 is of the kind 'hybrid'",
    ),
    _refusal(
        "rwkv",
        "recurrent layers",
        _TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        module="RwkvForCausalLM._is_stateful",
        says="keep state outside attention",
    ),
    _refusal(
        "recurrent_gemma",
        "recurrent layers among attention",
        _HEADS,
        num_hidden_layers=3,
        lru_width=32,
        module="RecurrentGemmaDecoderLayer.forward",
        says=_LINEAR,
    ),
    _refusal(
        "lfm2",
        "convolutions among attention",
        _COMMON,
        layer_types=["conv", "full_attention"],
        module="Lfm2DecoderLayer.forward",
        says="layer 0 is of the kind 'conv'",
    ),
    _refusal(
        "qwen3_next-hybrid",
        "linear attention among full",
        {**_HEADS, **_EXPERTS},
        model_type="qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=16,
        module="Qwen3NextDecoderLayer.forward",
        says=_LINEAR,
    ),
    _refusal(
        "llama4_text",
        "chunked attention",
        _HEADS,
        num_local_experts=4,
        layer_types=["chunked_attention", "full_attention"],
        module="Llama4TextAttention.forward",
        says="layer 0 is of the kind 'chunked_attention'",
    ),
    _refusal(
        "llama-dynamic",
        "rotary frequencies that follow the longest sequence",
        _COMMON,
        model_type="llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        module="dynamic_frequency_update",
        says="it branches on the values of a tensor",
    ),
    _refusal(
        "phi3-longrope",
        "rotary frequencies that follow the longest sequence",
        _COMMON,
        model_type="phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
        module="longrope_frequency_update",
        says="its forward changes self.model.model.rotary_emb.long_inv_freq",
    ),
    _refusal(
        "gemma4-shared",
        "keys shared between layers, with a short cut for one token",
        _HEADS,
        model_type="gemma4_text",
        num_hidden_layers=4,
        layer_types=_ALTERNATING["layer_types"] * 2,
        sliding_window=5,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=2,
        module="Gemma4TextModel._maybe_slice_kv_shared_inputs",
        says="Eq(u0, 1) (u0 is the number of tokens)",
    ),
    _refusal(
        "diffllama",
        "attention twice in a layer",
        _COMMON,
        num_key_value_heads=4,
        module="DiffLlamaAttention.forward",
        says="u0 > 1 (u0 is the number of tokens)",
    ),
    _refusal(
        "dbrx",
        "a loop over the experts that were hit",
        _TOKENS,
        d_model=32,
        n_heads=4,
        n_layers=2,
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        module="DbrxExperts.forward",
        says="a number that is not known while it is captured",
    ),
)


def make_model(family: Family) -> PreTrainedModel:
    """The family's model with weights of its own: no norm is one, no bias is zero."""
    config = AutoConfig.for_model(**family.config)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(1)
    tensors = [*model.parameters()]
    # Learned, though not by descent: DeepSeek's correction of the router.
    tensors += [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    with torch.no_grad():
        for tensor in tensors:
            scale = 0.3 if tensor.dim() > 1 else 0.2
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=scale)
        # Else a tied embedding makes each token its own likeliest successor.
        model.get_input_embeddings().weight.mul_(0.2)
    return model.eval()


def save_config(family: Family, directory: Path) -> None:
    """Saves the configuration alone: what vllmc needs to compile, and to refuse."""
    AutoConfig.for_model(**family.config).save_pretrained(directory)


def continuation(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[int, ...]:
    """What Transformers' `generate` continues `prompt` with, greedily and on past stop tokens."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


def job_of(
    directory: Path, cache: Path, backend: str = "eager", experts: ExpertsKind = "fused"
) -> Job:
    """The job to compile the model saved in `directory`."""
    model = resolve(str(directory), layers=None)
    spec = resolve_spec(CompileSpec(device="cpu", backend=backend, experts=experts), model)
    return make_job(model, spec, environment={}, cache_dir=cache, origins={})


def obtain(job: Job, cache: Path) -> Ready:
    """The job's program, from the cache directory or compiled."""
    return obtain_program(job, Store(cache), SilentObserver())


def entry_of(job: Job) -> torch.nn.Module:
    """The job's model with its saved weights."""
    return job.model.build("real", job.spec)


def generated(job: Job, ready: Ready) -> dict[int, tuple[tuple[int, ...], ...]]:
    """What vllmc continues the first prompts with, by the size of the batch."""
    program = open_program(ready, entry_of(job))
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    info = job.model.info
    limits = Limits(
        vocab_size=info.vocab_size or VOCAB,
        max_position=info.max_position,
        dtype=torch.float32,
        device="cpu",
    )
    results = {n: run_workload(program, PROMPTS[:n], params, limits) for n in BATCHES}
    return {n: tuple(o.token_ids for o in result.outputs) for n, result in results.items()}
