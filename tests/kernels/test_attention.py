import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attending import LAYER, LENGTHS, MIXED, OP, Batch, Case, WholeBatch
from torch.utils._python_dispatch import TorchDispatchMode

from vllmc.core.errors import VllmcError
from vllmc.kernels import attention
from vllmc.kernels.forward_context import forward_context, whole_sequences
from vllmc.kernels.kv_cache import LayerCache
from vllmc.kernels.layer_name import LayerName
from vllmc.kernels.quant import dynamic_scaled_quant, quantized_blocks, static_scaled_quant

UPDATE = torch.ops.vllmc.unified_kv_cache_update

CASES = {
    "plain": Case(),
    "one head each": Case(heads=3, kv_heads=3),
    "one key head": Case(heads=6, kv_heads=1),
    "smaller values": Case(key_size=12, value_size=8),
    "larger values": Case(key_size=8, value_size=20),
    "window of one": Case(window=1),
    "window": Case(window=5),
    "window beyond every sequence": Case(window=1000),
    "softcap": Case(softcap=1.5),
    "softcap and window": Case(softcap=1.5, window=4),
    "sinks": Case(sinks=True),
    "sinks and window": Case(sinks=True, window=3, heads=8, kv_heads=2),
    "everything": Case(sinks=True, softcap=2.0, window=6, value_size=4, scattered=True),
    "scattered blocks": Case(scattered=True),
    "scattered blocks and window": Case(scattered=True, window=6),
    "float64": Case(dtype=torch.float64),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16 softcap": Case(dtype=torch.bfloat16, softcap=1.5),
    "decodes only": Case(sequences=((5, 1), (1, 1), (17, 1))),
    "decodes of one length": Case(sequences=((7, 1),) * 4),
    "decodes of one length in a window": Case(sequences=((9, 1),) * 3, window=3, value_size=12),
    "decodes under one window": Case(sequences=((9, 1), (6, 1), (11, 1)), window=3),
    "decodes of one length between others": Case(
        sequences=((7, 1), (7, 1), (0, 5), (7, 1), (3, 1), (4, 1)), heads=6
    ),
    "scattered decodes": Case(sequences=((7, 1),) * 3, scattered=True, window=6),
    "bfloat16 decodes": Case(sequences=((7, 1),) * 3, dtype=torch.bfloat16),
    "one token": Case(sequences=((0, 1),)),
    "one prompt": Case(sequences=((0, 9),)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_op_computes_attention_as_defined(case: Case, seed: int) -> None:
    batch = Batch(case, seed)
    tolerance = 3e-2 if case.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(
        batch.run().double(), batch.reference(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        (Case(sequences=((7, 1),) * 4), [4]),
        (Case(sequences=((7, 1), (7, 1), (20, 1), (7, 1))), [2, 1, 1]),
        (Case(sequences=((7, 1), (7, 1), (0, 5), (7, 1))), [2, 1]),
        (Case(sequences=((4, 1), (7, 1), (5, 1), (30, 1)), window=4), [2, 2]),
        (Case(sequences=((4, 1), (8, 1), (12, 1)), window=4), [2, 1]),
        (Case(sequences=((7, 1),) * 3, scattered=True), [1, 1, 1]),
    ],
)
def test_decodes_as_long_and_as_far_apart_are_attended_at_once(
    case: Case, counts: list[int]
) -> None:
    metadata = Batch(case, seed=0).metadata
    groups, others = metadata.decodes(case.window)
    assert [group.count for group in groups] == counts
    assert [span.query_len for span in others] == [q for _, q in case.sequences if q > 1]
    assert metadata.decodes(case.window)[0] is groups, "worked out again for each layer"


@pytest.mark.parametrize("feature", [{}, {"window": 4}, {"softcap": 2.0}, {"sinks": True}])
def test_queries_of_several_blocks_give_the_same(
    feature: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 3)
    batch = Batch(Case(sequences=((0, 10), (5, 8)), **feature), seed=0)
    torch.testing.assert_close(batch.run().double(), batch.reference(), rtol=2e-6, atol=2e-6)


BOTH_WAYS = {
    "plain": Case(kv_heads=4),
    "grouped heads": Case(),
    "larger values": Case(value_size=20),
    "window of one": Case(window=1),
    "window": Case(window=3),
    "window as long as a sequence": Case(window=5),
    "window beyond every sequence": Case(window=1000),
    "softcap and window": Case(softcap=1.5, window=4),
    "sinks": Case(sinks=True),
    "float64": Case(dtype=torch.float64, window=4),
    "bfloat16": Case(dtype=torch.bfloat16, window=4),
}


@pytest.mark.parametrize("block", [1024, 4, 3])
@pytest.mark.parametrize("case", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_attention_both_ways_sees_all_of_a_sequence_within_the_window_on_either_side(
    case: Case, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    batch = WholeBatch(case)
    tolerance = 3e-2 if case.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(
        batch.run().double(), batch.reference(), rtol=tolerance, atol=tolerance
    )


def test_attention_both_ways_takes_transposed_inputs_as_they_are() -> None:
    batch = WholeBatch(Case(value_size=6, window=3))
    expected = batch.run()
    for name in ("query", "key", "value"):
        tensor = getattr(batch, name)
        setattr(batch, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(batch.run(), expected)


def test_attention_both_ways_refuses_a_part_of_a_sequence() -> None:
    batch = Batch(Case(), seed=0)
    output = torch.zeros(1, batch.query.shape[1], 4, 8)
    args = (batch.query, batch.key, batch.value, output, LAYER, 1.0, None, None, None, False)
    with (
        forward_context(batch.context),
        pytest.raises(VllmcError, match="1 of a sequence's 8") as caught,
    ):
        OP.default(*args)
    assert caught.value.code == "incomplete-sequence"
    with pytest.raises(VllmcError) as caught:
        OP.default(*args)
    assert caught.value.code == "no-forward-context"


def test_causal_attention_refuses_a_context_without_caches() -> None:
    batch = WholeBatch(Case())
    output = torch.zeros(1, sum(LENGTHS), 4, 8)
    with forward_context(whole_sequences(LENGTHS)), pytest.raises(VllmcError) as caught:
        OP.default(batch.query, batch.key, batch.value, output, LAYER, 1.0)
    assert caught.value.code == "unknown-layer"


def test_the_steps_keys_and_values_are_stored_where_the_metadata_says() -> None:
    batch = Batch(Case(scattered=True, value_size=6), seed=3)
    batch.run()
    slots = batch.metadata.slots
    assert torch.equal(batch.cache.key[slots], batch.key[0])
    assert torch.equal(batch.cache.value[slots], batch.value[0])
    stored = sum(context + new for context, new in MIXED)
    written = ~batch.cache.key.isnan().any(dim=(1, 2))
    assert int(written.sum()) == stored, "a slot of no token was written"


def test_a_string_and_a_layer_name_name_the_same_layer() -> None:
    first, second = Batch(Case(), seed=5), Batch(Case(), seed=5)
    assert torch.equal(first.run("layer"), second.run(LayerName("layer")))


def test_transposed_inputs_and_outputs_are_taken_as_they_are() -> None:
    batch = Batch(Case(value_size=6), seed=6)
    expected = batch.run()
    for name in ("query", "key", "value"):
        tensor = getattr(batch, name)
        setattr(batch, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
    assert not batch.query.is_contiguous()
    torch.testing.assert_close(batch.run(), expected)


def test_without_a_forward_context_the_error_names_the_layer() -> None:
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(VllmcError, match=r"model\.layers\.3") as caught:
        OP.str(tensor, tensor, tensor, tensor.clone(), "model.layers.3", 1.0)
    assert caught.value.code == "no-forward-context"


def test_a_layer_without_a_cache_is_named() -> None:
    with pytest.raises(VllmcError, match="other") as caught:
        Batch(Case(), seed=0).run(LayerName("other"))
    assert caught.value.code == "unknown-layer"
    assert caught.value.context["layers"] == ["layer"]


def test_a_forward_context_ends_with_its_block_also_after_an_error() -> None:
    batch = Batch(Case(), seed=0)
    with pytest.raises(VllmcError, match="other"):
        batch.run(LayerName("other"))
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(VllmcError) as caught:
        OP.default(tensor, tensor, tensor, tensor.clone(), LayerName("layer"), 1.0)
    assert caught.value.code == "no-forward-context"


class Seen(TorchDispatchMode):
    """Notes the ops that the dispatcher is given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [LayerName("layer"), "layer"], ids=["opaque", "string"])
def test_past_the_dispatcher_the_op_does_the_same(name: LayerName | str) -> None:
    overload = OP.str if isinstance(name, str) else OP.default
    call = attention.past_dispatcher(overload)
    assert call is not overload
    first, second = (Batch(Case(window=5, value_size=6), seed=4) for _ in range(2))
    outputs = []
    for function, batch in ((overload, first), (call, second)):
        output = torch.full((1, batch.query.shape[1], 4, 6), math.nan)
        with torch.no_grad(), forward_context(batch.context):
            function(batch.query, batch.key, batch.value, output, name, batch.scale, 5, sinks=None)
        outputs.append(output)
    assert torch.equal(*outputs)
    assert torch.equal(first.cache.key.nan_to_num(), second.cache.key.nan_to_num())


@pytest.mark.parametrize("watched", [True, False])
def test_the_dispatcher_is_passed_by_only_where_nobody_looks(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not watched:
        monkeypatch.setattr(attention, "is_watched", lambda _: False)
    batch = Batch(Case(), seed=0)
    output = torch.zeros(1, batch.query.shape[1], 4, 8)
    call = attention.past_dispatcher(OP.default)
    with torch.no_grad(), forward_context(batch.context), Seen() as seen:
        call(batch.query, batch.key, batch.value, output, LAYER, 1.0)
    assert ("vllmc::unified_attention_with_output" in seen.names) is watched


def test_other_ops_and_other_kernels_of_the_op_go_through_the_dispatcher() -> None:
    assert attention.past_dispatcher(torch.ops.aten.mm.default) is torch.ops.aten.mm.default
    library = torch.library.Library("vllmc", "IMPL")
    library.impl("unified_attention_with_output", lambda *_: None, "CUDA")
    assert attention.past_dispatcher(OP.default) is OP.default
    library._destroy()
    assert attention.past_dispatcher(OP.default) is not OP.default


@pytest.mark.parametrize("overload", [OP.default, OP.str])
def test_the_schema_says_that_the_output_and_its_scales_alone_are_written(
    overload: torch._ops.OpOverload,
) -> None:
    schema = overload._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["output", "output_block_scale"]
    assert schema.name == "vllmc::unified_attention_with_output"
    assert not schema.returns


@pytest.mark.parametrize("name", [LayerName("layer"), "layer"])
def test_torchs_own_checks_of_an_op_pass(name: LayerName | str) -> None:
    batch = Batch(Case(sinks=True, window=3), seed=1)
    output = torch.zeros(1, batch.query.shape[1], 4, 8)
    op = OP.str if isinstance(name, str) else OP.default
    args = (batch.query, batch.key, batch.value, output, name, 1.0, 3, None, batch.sinks)
    with forward_context(batch.context):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


QUANTIZED = (torch.float8_e4m3fn, torch.int8)
FORMS = {
    "mixed": Batch(Case(), seed=0),
    "explicit scores": Batch(Case(softcap=1.5, sinks=True), seed=0),
    "decodes": Batch(Case(sequences=((7, 1),) * 4, dtype=torch.bfloat16), seed=0),
}


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("form", FORMS)
def test_a_scale_quantises_what_attention_gives_without_it(form: str, dtype: torch.dtype) -> None:
    batch = FORMS[form]
    scale = torch.tensor([0.01])
    output = batch.run(output=batch.poisoned(dtype), output_scale=scale)
    expected = static_scaled_quant(batch.run(), scale, dtype)
    assert output.dtype is dtype
    assert torch.equal(output.float(), expected.float())


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("blocks", [1, 4, 32, 16])
@pytest.mark.parametrize("form", FORMS)
def test_each_block_of_a_token_has_the_scale_of_its_largest_element(
    form: str, blocks: int, dtype: torch.dtype
) -> None:
    batch = FORMS[form]
    plain = batch.run()
    tokens = plain.shape[1]
    scales = torch.full((1, tokens, blocks), math.nan)
    output = batch.run(output=batch.poisoned(dtype), output_block_scale=scales)
    for token, given, quantised in zip(plain[0], scales[0], output[0], strict=True):
        parts = zip(token.view(blocks, -1), given, quantised.view(blocks, -1), strict=True)
        for part, scale, found in parts:
            expected, dynamic = dynamic_scaled_quant(part, dtype)
            assert torch.equal(scale.view(1), dynamic)
            assert torch.equal(found.float(), expected.float())


def test_attention_both_ways_quantises_too() -> None:
    batch = WholeBatch(Case(window=3))
    output = torch.zeros(1, sum(LENGTHS), 4, 8, dtype=torch.int8)
    scale = torch.tensor([0.01])
    with forward_context(whole_sequences(LENGTHS)):
        OP.default(
            batch.query, batch.key, batch.value, output, LAYER, batch.scale, 3, None, None, False,
            scale,
        )  # fmt: skip
    assert torch.equal(output, static_scaled_quant(batch.run(), scale, torch.int8))


@pytest.mark.parametrize(
    ("dtype", "scales", "named"),
    [
        (torch.int8, {}, "neither output_scale nor output_block_scale"),
        (torch.int8, {"output_scale": 1, "output_block_scale": (1, 16, 2)}, "both output_scale"),
        (torch.float32, {"output_scale": 1}, "output_scale is given"),
        (torch.float32, {"output_block_scale": (1, 16, 2)}, "output_block_scale is given"),
        (torch.float16, {"output_scale": 1}, "torch.float16"),
        (torch.int8, {"output_scale": 2}, "output_scale holds 2 numbers"),
        (torch.int8, {"output_block_scale": (1, 16, 5)}, "a divisor of 32"),
        (torch.int8, {"output_block_scale": (1, 15, 2)}, r"not \[1, 16, G\]"),
        (torch.int8, {"output_block_scale": (16, 2)}, r"is \[16, 2\]"),
        (torch.int8, {"output_block_scale": (1, 16, 0)}, r"is \[1, 16, 0\]"),
    ],
)
def test_scales_that_do_not_fit_the_output_are_named(
    dtype: torch.dtype, scales: dict[str, Any], named: str
) -> None:
    batch = FORMS["mixed"]
    assert batch.query.shape[1] == 16
    with pytest.raises(VllmcError, match=named) as caught:
        batch.run(
            output=batch.poisoned(dtype), **{n: torch.zeros(shape) for n, shape in scales.items()}
        )
    assert caught.value.code == "bad-attention-output"


@pytest.mark.parametrize("name", [LAYER, "layer"], ids=["opaque", "string"])
def test_an_update_and_attention_after_it_are_what_attention_is_by_itself(
    name: LayerName | str,
) -> None:
    alone, apart = (Batch(Case(scattered=True, value_size=6), seed=3) for _ in range(2))
    expected = alone.run(name)
    update = UPDATE.str if isinstance(name, str) else UPDATE.default
    with forward_context(apart.context):
        token = update(apart.key, apart.value, name)
    assert (token.shape, token.dtype) == ((0,), apart.key.dtype)
    stored = apart.cache.key.clone()
    assert torch.equal(stored.nan_to_num(), alone.cache.key.nan_to_num())
    assert torch.equal(apart.run(name, kv_cache_dummy_dep=token), expected)


def test_attention_stores_nothing_once_an_update_has() -> None:
    batch = Batch(Case(), seed=0)
    with forward_context(batch.context):
        token = UPDATE.default(batch.key, batch.value, LAYER)
    batch.key, batch.value = torch.zeros_like(batch.key), torch.zeros_like(batch.value)
    torch.testing.assert_close(
        batch.run(kv_cache_dummy_dep=token).double(), batch.reference(), rtol=2e-6, atol=2e-6
    )


def test_an_update_names_the_layer_that_it_does_not_find() -> None:
    batch = Batch(Case(), seed=0)
    with pytest.raises(VllmcError, match=r"model\.layers\.3") as caught:
        UPDATE.str(batch.key, batch.value, "model.layers.3")
    assert caught.value.code == "no-forward-context"
    with forward_context(batch.context), pytest.raises(VllmcError, match="other") as caught:
        UPDATE.default(batch.key, batch.value, LayerName("other"))
    assert caught.value.code == "unknown-layer"


@pytest.mark.parametrize("scale", ["output_scale", "output_block_scale"])
def test_torchs_own_checks_pass_with_a_quantised_output_and_a_token(scale: str) -> None:
    batch = Batch(Case(), seed=1)
    given = torch.ones(1) if scale == "output_scale" else torch.ones(1, 16, 4)
    args = (batch.query, batch.key, batch.value, batch.poisoned(torch.int8), LAYER, 1.0)
    with forward_context(batch.context):
        token = UPDATE.default(batch.key, batch.value, LAYER)
        torch.library.opcheck(
            OP.default,
            args,
            {scale: given, "kv_cache_dummy_dep": token},
            test_utils=("test_schema", "test_faketensor"),
        )
        torch.library.opcheck(
            UPDATE.default,
            (batch.key, batch.value, LAYER),
            test_utils=("test_schema", "test_faketensor"),
        )


def on_gpu(batch: Batch) -> Batch:
    """The batch with its tensors on the GPU; block tables stay where the engine has them."""
    for name in ("query", "key", "value", "sinks"):
        tensor = getattr(batch, name)
        setattr(batch, name, None if tensor is None else tensor.cuda())
    batch.cache = LayerCache(batch.cache.key.cuda(), batch.cache.value.cuda())
    batch.metadata = dataclasses.replace(batch.metadata, slots=batch.metadata.slots.cuda())
    return batch


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a GPU."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    marked: Callable[..., None] = pytest.mark.gpu(without(test))
    return marked


ON_GPU = {name: case for name, case in CASES.items() if case.dtype is not torch.float64}


@gpu
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", ON_GPU.values(), ids=ON_GPU.keys())
def test_a_gpu_computes_attention_as_defined(case: Case, split: bool) -> None:
    batch = on_gpu(Batch(case, seed=0))
    expected = on_gpu(Batch(case, seed=0)).reference()
    options = {}
    if split:
        with forward_context(batch.context):
            options["kv_cache_dummy_dep"] = UPDATE.default(batch.key, batch.value, LAYER)
        batch.key, batch.value = torch.zeros_like(batch.key), torch.zeros_like(batch.value)
    output = batch.run(output=batch.poisoned().cuda(), **options)
    tolerance = 3e-2 if case.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        output.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance
    )


@gpu
def test_a_gpu_divides_the_keys_of_long_sequences() -> None:
    case = Case(sequences=((4000, 1), (700, 1)), block_size=16, scattered=True)
    batch = on_gpu(Batch(case, seed=0))
    expected = on_gpu(Batch(case, seed=0)).reference()
    output = batch.run(output=batch.poisoned().cuda())
    torch.testing.assert_close(output.double().cpu(), expected.cpu(), rtol=1e-5, atol=1e-5)


@gpu
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_gpu_quantises_what_it_attends(dtype: torch.dtype) -> None:
    batch = on_gpu(Batch(Case(dtype=torch.bfloat16), seed=0))
    plain = batch.run(output=batch.poisoned().cuda())
    scale = torch.tensor([0.01], device="cuda")
    output = batch.run(output=batch.poisoned(dtype).cuda(), output_scale=scale)
    assert torch.equal(output.float(), static_scaled_quant(plain, scale, dtype).float())
    scales = torch.full((1, 16, 4), math.nan, device="cuda")
    output = batch.run(output=batch.poisoned(dtype).cuda(), output_block_scale=scales)
    blocks, expected = quantized_blocks(plain.view(1, 16, 4, -1), dtype)
    assert torch.equal(scales, expected)
    assert torch.equal(output.float(), blocks.view(output.shape).float())


@gpu
def test_a_gpu_attends_both_ways() -> None:
    batch = WholeBatch(Case(window=3, value_size=20))
    expected = batch.reference()
    for name in ("query", "key", "value"):
        setattr(batch, name, getattr(batch, name).cuda())
    torch.testing.assert_close(batch.run().double().cpu(), expected, rtol=1e-5, atol=1e-5)
