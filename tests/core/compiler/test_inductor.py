from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllmc.core.compiler.container import NATIVE, unpack
from vllmc.core.errors import VllmcError
from vllmc.core.spec import CompileRange
from vllmc.core.torch_compat.config import snapshot, vllmc_overrides
from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.minors.torch_2_11 import Torch211

pytestmark = pytest.mark.slow

Compute = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _constant(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    return x * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])


def _product_with_bias(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    return torch.addmm(entry.linear.bias, x[0], entry.linear.weight)[None]


def _several_products(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    y = F.silu(entry.linear(x)) * entry.linear(x + 1)
    return y @ entry.linear.weight + torch.baddbmm(y, x, entry.linear.weight[None])


def _grouped_product(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    weights = torch.stack([entry.linear.weight, entry.linear.weight * 2]).bfloat16()
    first = torch.ones((), dtype=torch.int32)
    ends = torch.stack([first, torch.full_like(first, 1) * x.shape[1]]).to(torch.int32)
    return torch._grouped_mm(x[0].bfloat16(), weights, offs=ends).float()[None]


def _two_results_of_a_library_call(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    values, order = torch.sort(x, -1)
    return values + order


def _kernels_around_a_library_call(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    return (x.sin().cumsum(1) * 2).cos()


def _sizes(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    tokens = x.shape[1]
    seen = torch.arange(tokens)[:, None] >= torch.arange(tokens)[None]
    return (seen.float() @ x[0])[None] / tokens


def _rows(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
    y = x.clone()
    return y.index_add(1, rows, torch.ones(1, rows.shape[0], 8)) + F.one_hot(positions, 64)[..., :8]


@pytest.mark.parametrize(
    "compute",
    [
        _constant,
        _product_with_bias,
        _several_products,
        _grouped_product,
        _two_results_of_a_library_call,
        _kernels_around_a_library_call,
        _sizes,
        _rows,
    ],
    ids=lambda c: c.__name__.strip("_"),
)
def test_compiled_pieces_compute_what_the_module_does(
    link_toy: Any, ops: Any, compute: Compute
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return compute(entry, ops.cut(x), positions, rows)[0]

    toy = link_toy(function, backend="inductor")
    toy.check(1, 2, 17, 64)
    for made in toy.artifacts.values():
        opened = unpack(made.artifact)
        assert opened.format == NATIVE
        assert "_inductor" not in opened.text("wrapper.py")


@pytest.mark.parametrize(
    "function",
    [
        lambda ops, x: ops.cut(ops.cut(x).view(-1, 8)),
        lambda ops, x: ops.cut(ops.cut(x).contiguous())[0],
        lambda ops, x: ops.cut(ops.cut(x).detach())[0],
        lambda ops, x: ops.cut(torch.empty_like(x).copy_(ops.cut(x)))[0],
    ],
    ids=["a view of an input", "an input", "nothing", "an allocation"],
)
def test_pieces_that_hardly_compute(link_toy: Any, ops: Any, function: Any) -> None:
    toy = link_toy(lambda e, x, p, r: function(ops, x), backend="inductor")
    toy.check(1, 2, 17, 64)


@pytest.mark.parametrize("kind", ["unbacked", "backed", "backed-size-oblivious"])
@pytest.mark.parametrize(
    ("ranges", "sizes", "tokens"),
    [
        ([(1, 64)], [], [1, 2, 17, 64]),
        ([(1, 1)], [], [1]),
        ([], [1, 8], [1, 8]),
        ([(1, 4), (9, 64)], [6, 9], [1, 2, 4, 6, 9, 10, 63, 64]),
    ],
    ids=str,
)
def test_every_range_and_size_computes_at_its_ends(
    link_toy: Any, ops: Any, ranges: Any, sizes: Any, tokens: Any, kind: str
) -> None:
    toy = link_toy(
        lambda e, x, p, r: e.linear(ops.cut(e.linear(x).relu()))[0, r] * r.shape[0],
        ranges=tuple(CompileRange(*r) for r in ranges),
        sizes=tuple(sizes),
        dynamic_shapes=kind,
        backend="inductor",
    )
    toy.check(*tokens)


def _mlp(ops: Any) -> Compute:
    return lambda e, x, p, r: F.silu(e.linear(ops.cut(x + 1)) * 3).softmax(-1)[0]


def test_compiling_twice_gives_the_same_bytes(link_toy: Any, ops: Any) -> None:
    one, other = (link_toy(_mlp(ops), backend="inductor").artifacts for _ in range(2))
    assert one == other


def test_an_option_that_the_code_does_not_show_leaves_the_code_digest(
    link_toy: Any, ops: Any
) -> None:
    plain = link_toy(_mlp(ops), backend="inductor").artifacts
    spurious = link_toy(
        _mlp(ops), backend="inductor", inductor=(("max_autotune_gemm_search_space", "EXHAUSTIVE"),)
    ).artifacts
    other = link_toy(_mlp(ops), backend="inductor", inductor=(("cpp.simdlen", 1),)).artifacts
    for place, made in plain.items():
        assert spurious[place].code == made.code
        assert other[place].code != made.code


def test_threads_compile_under_options_of_their_own(link_toy: Any, ops: Any) -> None:
    options: dict[str, tuple[tuple[str, Any], ...]] = {
        "plain": (),
        "scalar": (("cpp.simdlen", 1),),
    }
    alone = {
        name: link_toy(_mlp(ops), backend="inductor", inductor=chosen).artifacts
        for name, chosen in options.items()
    }
    assert alone["plain"] != alone["scalar"]
    beside: dict[str, Any] = {}
    barrier = threading.Barrier(len(options))

    def work(name: str) -> None:
        barrier.wait()
        beside[name] = link_toy(_mlp(ops), backend="inductor", inductor=options[name]).artifacts

    threads = [threading.Thread(target=work, args=(name,)) for name in options]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert beside == alone


# The autotuning of torch 2.11 uses what torch deprecates.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_compiling_leaves_torchs_configuration_as_it_was(link_toy: Any, ops: Any) -> None:
    from vllmc.core.spec import CompileSpec

    def state() -> list[Any]:
        groups: list[Any] = ["inductor", "functorch", "dynamo"]
        plain = vllmc_overrides(CompileSpec())
        return [snapshot(group, plain) for group in groups]

    before = state()
    link_toy(
        _mlp(ops),
        backend="inductor",
        dynamic_shapes="backed-size-oblivious",
        inductor=(("max_autotune", True), ("cpp.simdlen", 1)),
        functorch=(("donated_buffer", False),),
    )
    assert state() == before
    assert not torch._inductor.config.max_autotune
    assert not torch.fx.experimental._config.backed_size_oblivious


def test_code_that_needs_inductor_to_load_is_refused(link_toy: Any, ops: Any) -> None:
    with pytest.raises(VllmcError, match="needs Inductor at run time") as caught:
        link_toy(_mlp(ops), backend="inductor", inductor=(("cpp_wrapper", True),))
    assert caught.value.code == "compile-failed"


@pytest.mark.skipif(isinstance(TORCH, Torch211), reason="torch 2.11 cannot capture it either")
def test_what_inductor_cannot_compile_says_so(link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        # A convolution over an unbacked size: Inductor asks for its strides.
        kernel = entry.linear.weight[:, :, None]
        return F.conv1d(ops.cut(x).transpose(1, 2), kernel).transpose(1, 2)[0]

    with pytest.raises(VllmcError, match="range 1:64") as caught:
        link_toy(function, backend="inductor")
    assert caught.value.code == "compile-failed"
    assert "--dynamic-shapes backed" in caught.value.hint
    toy = link_toy(function, backend="inductor", dynamic_shapes="backed")
    toy.check(1, 2, 17)


def test_a_result_that_inductor_lays_out_otherwise_is_laid_out_as_captured(
    link_toy: Any, ops: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        scores = torch.bmm(x, x.transpose(1, 2)).transpose(1, 2) * 2
        return ops.cut(x).sum() + scores

    link_toy(function, backend="inductor").check(1, 2, 17)


def test_a_result_with_gaps_that_is_laid_out_otherwise_is_an_error(link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        scores = (torch.bmm(x, x.transpose(1, 2)).transpose(1, 2) * 2)[:, 1:]
        return ops.cut(x).sum() + scores

    toy = link_toy(function, backend="inductor")
    with pytest.raises(VllmcError, match="otherwise in memory") as caught:
        toy.check(3)
    assert caught.value.code == "other-layout"


def test_without_a_compiler_the_error_says_so(
    link_toy: Any, ops: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.utils import fresh_cache

    with fresh_cache(), pytest.raises(VllmcError) as caught:
        link_toy(_mlp(ops), backend="inductor", inductor=(("cpp.cxx", [str(tmp_path / "no-g++")]),))
    assert caught.value.code == "no-compiler"


def test_inductors_own_bundle_comes_back_as_a_function(trace_toy: Any, ops: Any) -> None:
    """What artifacts for a GPU are; on a CPU it lacks the kernels' libraries, and finds them."""
    from vllmc.core.compiler.container import BUNDLE, pack
    from vllmc.core.compiler.protocol import example_inputs, example_scope
    from vllmc.core.graph.plan import make_plan, plan_units
    from vllmc.core.runtime.loader import load_artifact
    from vllmc.core.torch_compat.config import applied
    from vllmc.core.torch_compat.inductor import generate_bundle

    captured, spec = trace_toy(lambda e, x, p, r: ops.cut(ops.cut(x).sin() * 2)[0])
    unit = plan_units(make_plan(captured, spec), spec)[1][1]
    with applied(vllmc_overrides(spec)):
        scope = example_scope(unit, spec)
        data = generate_bundle(unit.piece.module, example_inputs(unit, scope), scope)
    call = load_artifact(pack(BUNDLE, {}, {"bundle": data}))
    for tokens in (1, 5):
        x = torch.randn(1, tokens, 8)
        args = [x if hasattr(given, "shape") else tokens for given in unit.piece.inputs]
        (result,) = call(args)
        torch.testing.assert_close(result, x.sin() * 2)


def test_the_code_of_a_bundle_is_what_was_generated_and_nothing_else(
    trace_toy: Any, ops: Any
) -> None:
    from vllmc.core.compiler.protocol import example_inputs, example_scope
    from vllmc.core.graph.plan import make_plan, plan_units
    from vllmc.core.torch_compat.config import applied
    from vllmc.core.torch_compat.inductor import bundle_code, generate_bundle

    def bundle(factor: float, *options: tuple[str, Any]) -> bytes:
        captured, spec = trace_toy(
            lambda e, x, p, r: ops.cut(ops.cut(x).sin() * factor)[0], inductor=options
        )
        unit = plan_units(make_plan(captured, spec), spec)[1][1]
        with applied(vllmc_overrides(spec)):
            scope = example_scope(unit, spec)
            return generate_bundle(unit.piece.module, example_inputs(unit, scope), scope)

    plain, tuned = bundle(2), bundle(2, ("max_autotune_pointwise", True))
    assert plain != tuned, "else the test shows nothing"
    assert bundle_code(plain) == bundle_code(tuned)
    assert bundle_code(plain) != bundle_code(bundle(3))
    assert bundle_code(plain) != bundle_code(bundle(2, ("size_asserts", False)))


def test_a_pass_sees_each_bundle_whatever_inductor_has_in_its_own_cache(
    trace_toy: Any, ops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllmc.core.compiler.protocol import example_inputs, example_scope
    from vllmc.core.graph.plan import make_plan, plan_units
    from vllmc.core.torch_compat.config import applied
    from vllmc.core.torch_compat.inductor import bundle_code, generate_bundle
    from vllmc.core.torch_compat.post_grad import at_post_grad

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    captured, spec = trace_toy(lambda e, x, p, r: ops.cut(ops.cut(x).sin() * 2)[0])
    unit = plan_units(make_plan(captured, spec), spec)[1][1]
    seen: list[int] = []
    codes = set()
    for turn in (1, 2):
        with applied(vllmc_overrides(spec)), at_post_grad(lambda g: seen.append(len(g.nodes))):
            scope = example_scope(unit, spec)
            data = generate_bundle(unit.piece.module, example_inputs(unit, scope), scope)
        assert len(seen) == turn
        codes.add(bundle_code(data))
    assert len(codes) == 1


def test_inductor_is_not_used_where_others_may_write_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllmc.core.cache.trust import Untrusted
    from vllmc.core.torch_compat.inductor import call_inductor, load_bundle
    from vllmc.core.torch_compat.shapes import ShapeScope

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    for use in (lambda: load_bundle(b""), lambda: call_inductor(lambda: 1, ShapeScope([]))):
        with pytest.raises(Untrusted, match="everybody may write") as caught:
            use()
        assert "TORCHINDUCTOR_CACHE_DIR" in caught.value.hint
    # As torch makes it for a user whose umask lets the group write.
    tmp_path.chmod(0o775)
    assert call_inductor(lambda: 1, ShapeScope([])) == 1


def test_what_inductor_would_need_a_runtime_wrapper_for_is_refused() -> None:
    from vllmc.core.torch_compat.inductor import CompileError, generate
    from vllmc.core.torch_compat.shapes import ShapeScope

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("transpose_", (x, 0, 1))
    graph.output((graph.call_method("sin", (x,)),))
    scope = ShapeScope([])
    with scope.fake_mode:
        example = torch.empty(2, 3)
    with pytest.raises(CompileError, match="1 inputs and 2 outputs"):
        generate(torch.fx.GraphModule({}, graph), [example], scope)
