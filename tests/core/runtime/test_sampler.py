import math

import pytest
import torch

from vllmc.core.errors import UsageError
from vllmc.core.runtime.sampler import Sampler, SamplingParams


def sampler(**params: object) -> Sampler:
    return Sampler(SamplingParams(max_new_tokens=1, **params), "cpu")


def test_temperature_zero_takes_the_most_probable_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 4.9]])
    assert sampler().sample(logits).token_ids == (1, 0)


def test_no_logprobs_are_made_unless_asked_for() -> None:
    assert sampler().sample(torch.zeros(1, 4)).logprobs is None


def test_a_seed_repeats_and_another_differs() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))

    def draws(seed: int) -> list[tuple[int, ...]]:
        one = sampler(temperature=1.0, top_p=0.9, seed=seed)
        return [one.sample(logits).token_ids for _ in range(3)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert len(set(draws(7))) == 3, "the generator does not move on"


def test_sampling_follows_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(40_000, 4)
    ids = torch.tensor(sampler(temperature=1.0, seed=0).sample(logits).token_ids)
    shares = ids.bincount(minlength=4) / len(ids)
    torch.testing.assert_close(shares, probs, atol=0.02, rtol=0)


def test_temperature_sharpens_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(40_000, 3)
    ids = torch.tensor(sampler(temperature=0.5, seed=0).sample(logits).token_ids)
    expected = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    shares = ids.bincount(minlength=3) / len(ids)
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {2}), (0.7, {2, 0}), (0.81, {2, 0, 3})])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log().expand(5_000, 4)
    ids = set(sampler(temperature=1.0, top_p=top_p, seed=0).sample(logits).token_ids)
    assert ids == kept


def test_a_tiny_temperature_is_greedy_not_a_failure() -> None:
    logits = torch.tensor([[50.0, 80.0, -30.0]]).expand(100, 3)
    assert set(sampler(temperature=1e-30, seed=0).sample(logits).token_ids) == {1}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_model(temperature: float) -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    result = sampler(temperature=temperature, seed=0, logprobs=2).sample(logits)
    assert result.logprobs is not None
    for row, token, logprobs in zip(logits, result.token_ids, result.logprobs, strict=True):
        denominator = math.log(sum(math.exp(x) for x in row.tolist()))
        assert logprobs.token_id == token
        assert logprobs.logprob == pytest.approx(float(row[token]) - denominator, abs=1e-5)
        best = sorted(range(6), key=lambda i: -float(row[i]))[:2]
        assert logprobs.rank == sum(x >= float(row[token]) for x in row.tolist())
        assert [i for i, _ in logprobs.top] == best
        assert [p for _, p in logprobs.top] == pytest.approx(
            [float(row[i]) - denominator for i in best], abs=1e-5
        )


def test_zero_logprobs_give_the_tokens_own_alone() -> None:
    result = sampler(logprobs=0).sample(torch.zeros(1, 4))
    assert result.logprobs is not None
    assert result.logprobs[0].top == ()
    assert result.logprobs[0].logprob == pytest.approx(-math.log(4))


def test_more_logprobs_than_tokens_give_all() -> None:
    result = sampler(logprobs=99).sample(torch.zeros(1, 4))
    assert result.logprobs is not None
    assert len(result.logprobs[0].top) == 4


@pytest.mark.parametrize(
    "params",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"logprobs": -1},
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{"max_new_tokens": 1, **params})
    assert caught.value.code == "bad-sampling"
