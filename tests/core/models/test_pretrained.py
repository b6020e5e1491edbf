import torch

from vllmc.core.models.pretrained import is_pretrained


def test_models_of_transformers_are_told_from_other_modules() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    assert is_pretrained(LlamaModel(config))
    assert not is_pretrained(LlamaModel(config).norm)
    assert not is_pretrained(torch.nn.Linear(2, 2))
