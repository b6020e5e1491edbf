"""The ops, eager and compiled by Inductor; what is counted are real backend compilations."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vllmc.core.errors import VllmcError
from vllmc.kernels.logprobs import (
    GatheredLogprobs,
    batched_count_greater_than,
    compiled,
    gather_logprobs,
)

with warnings.catch_warnings():
    # Importing Inductor makes torch use its own deprecated `torch.jit.script_method`.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._inductor.compile_fx

BATCHES = (1, 2, 1, 5, 64)
VOCAB = 97
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(batch: int, seed: int = 0) -> torch.Tensor:
    """`[batch, VOCAB]` logits of few distinct values, so that rows are full of ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-20, 20, (batch, VOCAB), generator=generator).float() / 4


def ids(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch,), generator=torch.Generator().manual_seed(seed))


def rank(row: Sequence[float], token: int) -> int:
    """By the definition, on Python's floats: the tokens better than this one, and its equals."""
    return sum(other >= row[token] for other in row)


def expect_same(got: GatheredLogprobs, expected: GatheredLogprobs) -> None:
    assert torch.equal(got.token_ranks, expected.token_ranks)
    assert torch.equal(got.top_ids, expected.top_ids)
    for name in ("token_logprobs", "top_logprobs"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), equal_nan=True)


@pytest.mark.slow
def test_the_count_is_compiled_once_for_every_batch_size() -> None:
    counter = CompileCounterWithBackend("inductor")
    count = compiled(batched_count_greater_than, backend=counter)
    for batch in BATCHES:
        x, values = rows(batch), rows(batch, seed=2)[:, :1]
        assert torch.equal(count(x, values), batched_count_greater_than(x, values))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_gathering_is_compiled_once_for_every_batch_size() -> None:
    counter = CompileCounterWithBackend("inductor")
    gather = compiled(gather_logprobs, backend=counter)
    for batch in BATCHES:
        expect_same(gather(rows(batch), ids(batch), 3), gather_logprobs(rows(batch), ids(batch), 3))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 64])
def test_no_layout_of_a_batch_compiles_again(first: int) -> None:
    counter = CompileCounterWithBackend("inductor")
    gather = compiled(gather_logprobs, backend=counter)
    for batch in (first, 1, 5):
        padded = torch.cat([rows(batch), torch.full((batch, 3), INF)], dim=1)
        last = torch.stack([rows(batch, seed=3), rows(batch)], dim=1)
        for logits in (rows(batch), padded[:, :VOCAB], last[:, -1], rows(batch).T.clone().T):
            tokens = torch.stack([ids(batch)] * batch, dim=1)[:, 0]
            expect_same(gather(logits, tokens, 2), gather_logprobs(logits, tokens, 2))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_ranks_of_nan_and_infinity_are_those_of_eager() -> None:
    gather = compiled(gather_logprobs)
    for batch in (1, 5):
        for place, value in enumerate((NAN, INF, -INF)):
            for token in (place, 50):
                logits = rows(batch)
                logits[0, place] = value
                tokens = torch.full((batch,), token)
                got = gather(logits, tokens, 1)
                expect_same(got, gather_logprobs(logits, tokens, 1))
                assert int(got.token_ranks[0]) == rank(logits[0].tolist(), token)


@pytest.mark.slow
def test_the_same_op_compiled_dynamic_without_marks_compiles_twice() -> None:
    counter = CompileCounterWithBackend("inductor")
    naive = torch.compile(batched_count_greater_than, dynamic=True, backend=counter)
    for batch in BATCHES:
        naive(rows(batch), rows(batch)[:, :1].contiguous())
    assert counter.frame_count == 2


def test_another_vocabulary_compiles_again() -> None:
    """Or the counter of the tests above counts nothing."""
    counter = CompileCounterWithBackend("eager")
    count = compiled(batched_count_greater_than, backend=counter)
    for vocab in (5, 6):
        count(torch.zeros(2, vocab), torch.zeros(2, 1))
    assert counter.frame_count == 2


def test_compiling_leaves_no_mark_on_the_callers_tensors() -> None:
    x, values = rows(2), torch.zeros(2, 1)
    compiled(batched_count_greater_than, backend="eager")(x, values)
    assert not hasattr(x, "_dynamo_unbacked_indices")
    assert not hasattr(values, "_dynamo_unbacked_indices")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_ranks_are_those_of_the_definition(batch: int, dtype: torch.dtype) -> None:
    logits, tokens = rows(batch).to(dtype), ids(batch)
    expected = [
        rank(row, token)
        for row, token in zip(logits.double().tolist(), tokens.tolist(), strict=True)
    ]
    assert gather_logprobs(logits, tokens, 0).token_ranks.tolist() == expected


def test_ranks_tell_logits_apart_whose_logarithms_round_to_one_number() -> None:
    logits = torch.tensor([[0.0, 1e-7, 2e-7, 12.0]])
    gathered = gather_logprobs(logits, torch.tensor([0]), 4)
    assert gathered.top_logprobs[0, 1] == gathered.token_logprobs[0]
    assert gathered.token_ranks.tolist() == [4]
    assert gathered.top_ids.tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("row", "token", "expected"),
    [
        ([1.0, 3.0, 2.0], 1, 1),
        ([1.0, 3.0, 2.0], 0, 3),
        ([2.0, 2.0, 2.0, 1.0], 1, 3),
        ([0.0, -0.0], 1, 2),
        ([5.0], 0, 1),
        ([NAN, 1.0, 2.0], 1, 2),
        ([NAN, 1.0, 2.0], 0, 0),
        ([NAN, 1.0, -INF], 2, 2),
        ([1.0, -INF, -INF, 0.0], 1, 4),
        ([-INF, -INF], 0, 2),
        ([INF, 1.0, INF], 0, 2),
    ],
)
def test_ties_and_what_is_no_number_count_as_documented(
    row: list[float], token: int, expected: int
) -> None:
    x = torch.tensor([row])
    assert batched_count_greater_than(x, x[:, token : token + 1]).tolist() == [expected]
    assert gather_logprobs(x, torch.tensor([token]), 1).token_ranks.tolist() == [expected]
    assert rank(row, token) == expected


@pytest.mark.parametrize("row", [[NAN, 1.0], [INF, 1.0], [-INF, -INF]])
def test_rows_without_probabilities_have_nan_for_logarithms(row: list[float]) -> None:
    gathered = gather_logprobs(torch.tensor([row]), torch.tensor([1]), 2)
    assert gathered.token_logprobs.isnan().all()
    assert gathered.top_logprobs.isnan().all()


def test_a_nan_comes_first_among_the_best() -> None:
    assert gather_logprobs(torch.tensor([[1.0, NAN]]), torch.tensor([0]), 1).top_ids == 1


def test_a_token_that_cannot_come_has_minus_infinity() -> None:
    gathered = gather_logprobs(torch.tensor([[0.0, -INF]]), torch.tensor([1]), 2)
    assert gathered.token_logprobs.tolist() == [-INF]
    assert gathered.top_logprobs.tolist() == [[0.0, -INF]]


def test_logprobs_are_natural_logarithms_of_the_softmax() -> None:
    logits, tokens = rows(4).double(), ids(4)
    gathered = gather_logprobs(logits, tokens, VOCAB + 5)
    assert gathered.top_logprobs.shape == gathered.top_ids.shape == (4, VOCAB)
    for index, row in enumerate(logits.tolist()):
        total = math.log(sum(math.exp(value) for value in row))
        expected = [row[token] - total for token in gathered.top_ids[index].tolist()]
        assert gathered.top_logprobs[index].tolist() == pytest.approx(expected, abs=1e-12)
        assert expected == sorted(expected, reverse=True)
        own = row[int(tokens[index])] - total
        assert float(gathered.token_logprobs[index]) == pytest.approx(own, abs=1e-12)


def test_logprobs_of_half_precision_are_computed_in_float32() -> None:
    logits = rows(3).bfloat16()
    gathered = gather_logprobs(logits, ids(3), 2)
    expect_same(gathered, gather_logprobs(logits.float(), ids(3), 2))
    assert gathered.top_logprobs.dtype == torch.float32


@pytest.mark.parametrize("form", [lambda op: op, lambda op: compiled(op, backend="eager")])
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (batched_count_greater_than, (torch.zeros(0, 4), torch.zeros(0, 1))),
        (batched_count_greater_than, (torch.zeros(3, 4), torch.zeros(2, 1))),
        (batched_count_greater_than, (torch.zeros(3, 4), torch.zeros(3, 2))),
        (batched_count_greater_than, (torch.zeros(4), torch.zeros(4, 1))),
        (gather_logprobs, (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 1)),
        (gather_logprobs, (torch.zeros(1, 4), torch.zeros(2, dtype=torch.int64), 1)),
    ],
    ids=["empty", "other rows", "two values a row", "one row", "gather empty", "gather other rows"],
)
def test_bad_batches_are_refused_with_the_op_and_shapes(
    form: Callable[[Callable[..., object]], Callable[..., object]],
    op: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    with pytest.raises(VllmcError) as caught:
        form(op)(*arguments)
    shapes = [list(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
    assert caught.value.code == "bad-batch"
    assert caught.value.context == {"op": op.__name__, "shapes": shapes}
    assert op.__name__ in caught.value.message
    assert all(str(shape) in caught.value.message for shape in shapes)


def test_a_batch_refused_does_not_spoil_the_compiled_op() -> None:
    counter = CompileCounterWithBackend("eager")
    count = compiled(batched_count_greater_than, backend=counter)
    for batch in (3, 0, 1):
        x = rows(batch)
        if batch:
            assert torch.equal(count(x, x[:, :1]), batched_count_greater_than(x, x[:, :1]))
        else:
            with pytest.raises(VllmcError):
                count(x, x[:, :1])
    assert counter.frame_count == 1


def test_the_op_counts_as_the_function_does(device: torch.device) -> None:
    op = torch.ops.vllmc.batched_count_greater_than
    for batch in BATCHES:
        for x in (rows(batch), rows(batch).to(torch.bfloat16), rows(batch).T.clone().T):
            values = x[:, 5:6]
            expected = [rank(row, 5) for row in x.tolist()]
            assert op(x.to(device), values.to(device)).tolist() == expected
            assert batched_count_greater_than(x.to(device), values.to(device)).tolist() == expected


def test_the_op_is_what_it_says(device: torch.device) -> None:
    x = rows(5).to(device)
    torch.library.opcheck(torch.ops.vllmc.batched_count_greater_than.default, (x, x[:, :1]))


def test_a_function_with_the_op_is_compiled_once_for_every_batch_size(
    device: torch.device,
) -> None:
    """As on a GPU, where it is what the count is compiled to; here around the op on any device."""

    def count_and_add(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllmc.batched_count_greater_than(x, values) + 1

    counter = CompileCounterWithBackend("aot_eager")
    count = compiled(count_and_add, backend=counter)
    for batch in BATCHES:
        x, values = rows(batch).to(device), rows(batch, seed=2)[:, :1].to(device)
        assert torch.equal(count(x, values), batched_count_greater_than(x, values) + 1)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_op_is_in_the_compiled_function() -> None:
    counter = CompileCounterWithBackend("inductor")
    gather = compiled(gather_logprobs, backend=counter)
    for batch in BATCHES:
        logits, tokens = rows(batch).cuda(), ids(batch).cuda()
        expect_same(gather(logits, tokens, 3), gather_logprobs(logits, tokens, 3))
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert any("vllmc.batched_count_greater_than" in target for target in targets)
