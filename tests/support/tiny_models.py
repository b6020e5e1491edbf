"""Tiny models that several test modules save and resolve."""

from __future__ import annotations

from pathlib import Path


def save_llama(directory: Path, *, layers: int) -> Path:
    """The configuration of a Llama with this many layers, saved without weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ).save_pretrained(directory)
    return directory
