from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_families import (
    ENCODERS,
    MAX_POSITION,
    PROMPTS,
    EncoderFamily,
    hidden_states,
    make_encoder,
    save_encoder,
)
from transformers import AutoConfig, AutoModelForMaskedLM

from vllmc.core.errors import VllmcError
from vllmc.core.models import encoders
from vllmc.core.models.building import DecoderEntry, EncoderEntry, build_entry, encoder_of
from vllmc.core.models.encoders import encoder_info
from vllmc.core.models.model import EncoderInfo, Model
from vllmc.core.models.resolve import resolve
from vllmc.core.spec import CompileSpec, LayerNames
from vllmc.kernels.forward_context import forward_context, whole_sequences

BERT, ROBERTA = (next(f for f in ENCODERS if f.name == name) for name in ("bert", "roberta"))


def run(model: Model, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """The hidden states of each prompt, all of them run as one flattened batch."""
    entry = model.build("real", CompileSpec())
    assert model.info.encoder is not None
    return run_entry(entry, model.info.encoder, prompts)


def run_entry(
    entry: torch.nn.Module, encoder: EncoderInfo, prompts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, ...]:
    assert isinstance(entry, EncoderEntry)
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    positions = torch.tensor([[p for prompt in prompts for p in encoder.positions(prompt)]])
    lengths = [len(prompt) for prompt in prompts]
    with torch.no_grad(), forward_context(whole_sequences(lengths)):
        states: tuple[torch.Tensor, ...] = entry.forward(ids, positions).split(lengths)
    return states


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.name)
def test_each_prompt_of_a_batch_gets_what_eager_transformers_gives_it_alone(
    family: EncoderFamily, tmp_path: Path
) -> None:
    eager = save_encoder(family, tmp_path)
    model = resolve(str(tmp_path))
    assert sum(map(len, PROMPTS)) > MAX_POSITION
    for states, prompt in zip(run(model, PROMPTS), PROMPTS, strict=True):
        torch.testing.assert_close(states, hidden_states(eager, prompt), rtol=1e-5, atol=2e-5)
    alone = hidden_states(eager, PROMPTS[0][-1:])
    assert not torch.allclose(hidden_states(eager, PROMPTS[0])[-1:], alone, atol=1e-2)


def test_every_family_was_compared() -> None:
    assert {family.name for family in ENCODERS} == set(encoders.ENCODERS)


def test_a_padding_token_within_a_prompt_is_not_counted_where_eager_does_not_count_it(
    tmp_path: Path,
) -> None:
    eager = save_encoder(ROBERTA, tmp_path)
    prompts = [[5, 6, 1, 1, 7], [1, 8]]
    for states, prompt in zip(run(resolve(str(tmp_path)), prompts), prompts, strict=True):
        torch.testing.assert_close(states, hidden_states(eager, prompt), rtol=1e-5, atol=2e-5)


def test_positions_begin_at_zero_or_after_the_padding_token_s_id() -> None:
    assert EncoderInfo().positions([7, 0, 1]) == [0, 1, 2]
    assert EncoderInfo(padding_id=1).positions([7, 0, 9]) == [2, 3, 4]
    assert EncoderInfo(padding_id=1).positions([1, 7, 1, 9]) == [1, 2, 1, 3]


@pytest.mark.parametrize("family", [BERT, ROBERTA], ids=lambda family: family.name)
def test_the_longest_sequence_is_the_longest_that_eager_transformers_takes(
    family: EncoderFamily, tmp_path: Path
) -> None:
    eager = save_encoder(family, tmp_path)
    longest = resolve(str(tmp_path)).info.max_position
    assert longest is not None
    hidden_states(eager, [5] * longest)
    with pytest.raises((IndexError, RuntimeError)):
        hidden_states(eager, [5] * (longest + 1))


def test_the_weights_of_a_model_with_a_head_are_those_of_the_encoder_under_it(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    masked = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**BERT.config)).eval()
    masked.save_pretrained(tmp_path)
    model = resolve(str(tmp_path))
    [states] = run(model, PROMPTS[:1])
    expected = hidden_states(masked.base_model, PROMPTS[0])
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    entry = model.build("fake", CompileSpec())
    assert "model.pooler.dense.weight" not in dict(entry.named_parameters())


def test_weights_that_a_file_lacks_are_not_made_up(tmp_path: Path) -> None:
    save_encoder(BERT, tmp_path)
    with pytest.raises(VllmcError, match=r"encoder\.layer\.3") as caught:
        run(resolve(str(tmp_path), layers=4), PROMPTS)
    assert caught.value.code == "bad-weights"


def config(family: EncoderFamily, **changes: Any) -> Any:
    return AutoConfig.for_model(**{**family.config, **changes})


@pytest.mark.parametrize("architecture", ["BertLMHeadModel", "BertForCausalLM"])
def test_a_configuration_that_contradicts_itself_is_refused(architecture: str) -> None:
    with pytest.raises(VllmcError, match=f"'tiny'.*{architecture}") as caught:
        encoder_info("tiny", config(BERT, architectures=[architecture]))
    assert caught.value.code == "unsupported-model"


def test_a_decoder_of_a_family_of_encoders_is_none() -> None:
    decoder = config(BERT, is_decoder=True, architectures=["BertLMHeadModel"])
    assert encoder_info("tiny", decoder) is None
    assert encoder_info("tiny", config(BERT, architectures=["BertForMaskedLM"])) == EncoderInfo()


def test_positions_that_begin_after_no_padding_token_are_refused() -> None:
    with pytest.raises(VllmcError, match="pad_token_id") as caught:
        encoder_info("tiny", config(ROBERTA, pad_token_id=None))
    assert caught.value.code == "unsupported-model"


@pytest.mark.parametrize("kind", ["hoisted", "baked"])
def test_an_encoder_that_python_made_is_one(kind: LayerNames) -> None:
    eager, made = make_encoder(ROBERTA), make_encoder(ROBERTA)
    encoder = encoder_of("made", made)
    assert encoder == EncoderInfo(padding_id=1)
    states = run_entry(build_entry(made, CompileSpec(layer_names=kind)), encoder, PROMPTS)
    for found, prompt in zip(states, PROMPTS, strict=True):
        torch.testing.assert_close(found, hidden_states(eager, prompt), rtol=1e-5, atol=1e-5)


def test_a_model_with_a_head_is_no_encoder_when_python_made_it() -> None:
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**BERT.config))
    assert encoder_of("made", model) is None
    assert isinstance(build_entry(model, CompileSpec()), DecoderEntry)
