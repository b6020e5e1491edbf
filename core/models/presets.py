"""Built-in models: the published shapes of real ones. Imports no torch.

A preset is the part of a model's `config.json` that shapes its program, in the form that
Transformers 5 reads (`rope_parameters` holds what was `rope_theta` and `rope_scaling`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_PRESET = "tiny-llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named model configuration.

    `source` is the hub id whose `config.json` was followed (empty for one of our own making);
    `parameters` counts elements, a tied embedding once. `layers` and `hidden_size` repeat the
    configuration under one name, since model types name them differently.
    """

    name: str
    architecture: str
    layers: int
    hidden_size: int
    parameters: int
    source: str
    fields: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as a fresh dict for `AutoConfig.for_model(**config)`."""
        return {"architectures": [self.architecture], **copy.deepcopy(dict(self.fields))}


def find_preset(name: str) -> Preset | None:
    """The preset called `name`, if there is one."""
    return next((preset for preset in PRESETS if preset.name == name), None)


def _rope(theta: float, **scaling: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def _llama3_rope(factor: float) -> dict[str, object]:
    return _rope(
        500_000.0,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


_LLAMA_3_TOKENS = {"vocab_size": 128_256, "bos_token_id": 128_000, "eos_token_id": 128_001}

PRESETS: tuple[Preset, ...] = (
    Preset(
        name=DEFAULT_PRESET,
        architecture="LlamaForCausalLM",
        layers=2,
        hidden_size=256,
        parameters=5_547_264,
        source="",
        fields={
            "model_type": "llama",
            "vocab_size": 8000,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10_000.0),
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Preset(
        name="llama-3.2-1b",
        architecture="LlamaForCausalLM",
        layers=16,
        hidden_size=2048,
        parameters=1_235_814_400,
        source="meta-llama/Llama-3.2-1B",
        fields={
            "model_type": "llama",
            **_LLAMA_3_TOKENS,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _llama3_rope(32.0),
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="llama-3.1-8b",
        architecture="LlamaForCausalLM",
        layers=32,
        hidden_size=4096,
        parameters=8_030_261_248,
        source="meta-llama/Llama-3.1-8B",
        fields={
            "model_type": "llama",
            **_LLAMA_3_TOKENS,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _llama3_rope(8.0),
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="llama-3-70b",
        architecture="LlamaForCausalLM",
        layers=80,
        hidden_size=8192,
        parameters=70_553_706_496,
        source="meta-llama/Meta-Llama-3-70B",
        fields={
            "model_type": "llama",
            **_LLAMA_3_TOKENS,
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(500_000.0),
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="smollm2-135m",
        architecture="LlamaForCausalLM",
        layers=30,
        hidden_size=576,
        parameters=134_515_008,
        source="HuggingFaceTB/SmolLM2-135M",
        fields={
            "model_type": "llama",
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(100_000.0),
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="qwen2.5-7b",
        architecture="Qwen2ForCausalLM",
        layers=28,
        hidden_size=3584,
        parameters=7_615_616_512,
        source="Qwen/Qwen2.5-7B",
        fields={
            "model_type": "qwen2",
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "max_window_layers": 28,
            "sliding_window": None,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1_000_000.0),
            "tie_word_embeddings": False,
            "bos_token_id": 151_643,
            "eos_token_id": 151_643,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="qwen3-0.6b",
        architecture="Qwen3ForCausalLM",
        layers=28,
        hidden_size=1024,
        parameters=596_049_920,
        source="Qwen/Qwen3-0.6B",
        fields={
            "model_type": "qwen3",
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "max_window_layers": 28,
            "sliding_window": None,
            "use_sliding_window": False,
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1_000_000.0),
            "tie_word_embeddings": True,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="qwen3-8b",
        architecture="Qwen3ForCausalLM",
        layers=36,
        hidden_size=4096,
        parameters=8_190_735_360,
        source="Qwen/Qwen3-8B",
        fields={
            "model_type": "qwen3",
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "max_window_layers": 36,
            "sliding_window": None,
            "use_sliding_window": False,
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1_000_000.0),
            "tie_word_embeddings": False,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="mistral-7b",
        architecture="MistralForCausalLM",
        layers=32,
        hidden_size=4096,
        parameters=7_241_732_096,
        source="mistralai/Mistral-7B-v0.1",
        fields={
            "model_type": "mistral",
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10_000.0),
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="mixtral-8x7b",
        architecture="MixtralForCausalLM",
        layers=32,
        hidden_size=4096,
        parameters=46_702_792_704,
        source="mistralai/Mixtral-8x7B-v0.1",
        fields={
            "model_type": "mixtral",
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32_768,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1_000_000.0),
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="gemma-2-2b",
        architecture="Gemma2ForCausalLM",
        layers=26,
        hidden_size=2304,
        parameters=2_614_341_888,
        source="google/gemma-2-2b",
        fields={
            "model_type": "gemma2",
            "vocab_size": 256_000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(10_000.0),
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "dtype": "float32",
        },
    ),
    Preset(
        name="phi-3-mini",
        architecture="Phi3ForCausalLM",
        layers=32,
        hidden_size=3072,
        parameters=3_821_079_552,
        source="microsoft/Phi-3-mini-4k-instruct",
        fields={
            "model_type": "phi3",
            "vocab_size": 32_064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": 2047,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10_000.0, partial_rotary_factor=1.0),
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
            "dtype": "bfloat16",
        },
    ),
    Preset(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        layers=12,
        hidden_size=768,
        parameters=124_439_808,
        source="openai-community/gpt2",
        fields={
            "model_type": "gpt2",
            "vocab_size": 50_257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 50_256,
            "eos_token_id": 50_256,
        },
    ),
    Preset(
        name="pythia-160m",
        architecture="GPTNeoXForCausalLM",
        layers=12,
        hidden_size=768,
        parameters=162_322_944,
        source="EleutherAI/pythia-160m",
        fields={
            "model_type": "gpt_neox",
            "vocab_size": 50_304,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "rope_parameters": _rope(10_000.0, partial_rotary_factor=0.25),
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": "float16",
        },
    ),
)
