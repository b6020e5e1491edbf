from __future__ import annotations

import importlib
import io
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import torch

import vllmc.kernels
from vllmc.core.compiler.container import EAGER, NATIVE, pack
from vllmc.core.errors import UnsafeCacheError, VllmcError
from vllmc.core.runtime.loader import bind_piece, load_artifact

WRAPPER = b"def call(args):\n    (x,) = args\n    args.clear()\n    return (x * factor,)\n"


def saved(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def native(files: dict[str, bytes], *provided: str, **products: str) -> bytes:
    description: Any = {"provided": list(provided), "extern_kernels": products}
    return pack(NATIVE, description, {"wrapper.py": WRAPPER, **files})


def test_constants_are_given_to_the_wrapper() -> None:
    call = load_artifact(native({"constants/factor": saved(torch.tensor([2.0]))}, "factor"))
    (result,) = call([torch.ones(3)])
    assert result.tolist() == [2.0, 2.0, 2.0]


def test_library_calls_are_given_to_the_wrapper() -> None:
    wrapper = b"def call(args):\n    return (extern_kernels.product(*args),)\n"
    data = native({"wrapper.py": wrapper}, "extern_kernels", product="mm")
    (result,) = load_artifact(data)([torch.eye(2), torch.ones(2, 2)])
    assert result.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("held", [{}, {0: torch.eye(2)}, {1: torch.ones(2, 2)}], ids=str)
def test_arguments_may_be_bound_before_the_call(held: dict[int, torch.Tensor]) -> None:
    args = [torch.eye(2), torch.ones(2, 2)]
    wrapper = b"def call(args):\n    x, y = args\n    args.clear()\n    return (x @ y + x,)\n"
    graph = b"def forward(self, a0, a1):\n    return (a0 @ a1 + a0,)\n"
    for data in (
        native({"wrapper.py": wrapper}),
        pack(EAGER, {"imports": {}}, {"graph.py": graph}),
    ):
        bound = bind_piece(load_artifact(data), 2, held)
        for _ in range(2):
            (result,) = bound(*(a for place, a in enumerate(args) if place not in held))
            assert result.tolist() == [[2.0, 1.0], [1.0, 2.0]]


def test_what_this_machine_cannot_run_is_said_when_it_is_bound() -> None:
    wrapper = (
        b"import no_such_module\ndef call(args):\n    x, = args\n    args.clear()\n    return x\n"
    )
    piece = load_artifact(native({"wrapper.py": wrapper}))
    with pytest.raises(VllmcError, match="cannot be loaded") as caught:
        bind_piece(piece, 1, {0: torch.ones(2)})
    assert caught.value.code == "artifact-not-loadable"


def test_an_eager_graph_is_loaded() -> None:
    source = b"def forward(self, a0):\n    return (torch.clamp(a0, max = inf),)\n"
    imports: Any = {"torch": ["torch", ""], "inf": ["math", "inf"]}
    (result,) = load_artifact(pack(EAGER, {"imports": imports}, {"graph.py": source}))(
        [torch.ones(2)]
    )
    assert result.tolist() == [1.0, 1.0]


def test_an_unknown_format_is_a_bad_artifact() -> None:
    with pytest.raises(UnsafeCacheError, match="from-the-future") as caught:
        load_artifact(pack("from-the-future", {}, {}))
    assert caught.value.code == "bad-artifact"


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not an archive"])
def test_bytes_of_no_form_are_a_bad_artifact(data: bytes) -> None:
    with pytest.raises(UnsafeCacheError) as caught:
        load_artifact(data)
    assert caught.value.code == "bad-artifact"


@pytest.mark.parametrize(
    "data",
    [
        native({"kernels/factor.so": b"\x7fELF for another machine"}, "factor"),
        native({}, "factor"),
        native({}, "extern_kernels", product="no_such_function"),
        pack(EAGER, {"imports": {"f": ["no_such_module", "f"]}}, {"graph.py": b""}),
        pack(EAGER, {"imports": {"f": ["torch", "no_such_function"]}}, {"graph.py": b""}),
    ],
    ids=["library", "missing file", "library call", "module", "function"],
)
def test_what_this_machine_cannot_load_is_said(data: bytes) -> None:
    with pytest.raises(VllmcError) as caught:
        load_artifact(data)
    assert caught.value.code == "artifact-not-loadable"
    assert caught.value.context["cause"]


def test_every_op_is_there_where_artifacts_are_loaded() -> None:
    """In a process that only loads, neither passes nor a model's code define any."""
    for module in pkgutil.iter_modules(vllmc.kernels.__path__, "vllmc.kernels."):
        if not module.ispkg:
            importlib.import_module(module.name)
    names = {
        name.removeprefix("vllmc::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vllmc::")
    }
    assert "rms_norm_static_quant" in names
    script = (
        "import sys, torch, vllmc.core.runtime.loader\n"
        "print(*(name for name in sys.argv[1:] if not hasattr(torch.ops.vllmc, name)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
