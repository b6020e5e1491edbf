"""From an artifact's verified bytes to a function. Needs no Inductor, compiler or subprocess."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from vllmc.core.compiler.container import BUNDLE, EAGER, NATIVE, Container, unpack
from vllmc.core.errors import UnsafeCacheError, VllmcError
from vllmc.core.graph.targets import import_by_name
from vllmc.core.torch_compat import native
from vllmc.kernels import ops as _ops  # noqa: F401  (defines what artifacts call)

PieceCallable: TypeAlias = Callable[[list[Any]], Sequence[Any]]
"""Takes the list of a piece's arguments, which it may empty, and returns its outputs."""


BoundPiece: TypeAlias = Callable[..., Sequence[Any]]
"""Takes those of a piece's arguments that were not bound, and returns its outputs."""


def bind_piece(piece: PieceCallable, count: int, held: Mapping[int, object]) -> BoundPiece:
    """The piece, of `count` arguments, with those `held` in their places from now on.

    Raises `VllmcError` (`artifact-not-loadable`).
    """
    if isinstance(piece, native.Wrapper):
        with _loading(NATIVE):
            bound = piece.bind(held)
        if bound is not None:
            return bound
    places = [place for place in range(count) if place not in held]
    known = [held.get(place) for place in range(count)]

    def call(*given: object) -> Sequence[Any]:
        args = list(known)
        for place, value in zip(places, given, strict=True):
            args[place] = value
        return piece(args)

    return call


def load_artifact(data: bytes) -> PieceCallable:
    """Loads an artifact whose digest has been verified: loading runs the code in it.

    Raises `UnsafeCacheError` (`bad-artifact`) for bytes of no known form, `VllmcError`
    (`artifact-not-loadable`) where this machine cannot load it.
    """
    container = unpack(data)
    loaders = {NATIVE: _load_native, BUNDLE: _load_bundle, EAGER: _load_eager}
    if (load := loaders.get(container.format)) is None:
        raise UnsafeCacheError(
            "bad-artifact",
            f"an artifact has the unknown format '{container.format}'",
            hint="update vllmc, or compile it again: vllmc warm --force",
        )
    with _loading(container.format):
        return load(container)


@contextmanager
def _loading(format: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError, OSError, KeyError) as error:
        raise VllmcError(
            "artifact-not-loadable",
            "a stored artifact cannot be loaded on this machine",
            context={"format": format, "cause": str(error)},
            hint="compile it here: vllmc warm --force",
        ) from error


def _load_native(container: Container) -> PieceCallable:
    provided: dict[str, object] = {}
    names = container.description["provided"]
    products = container.description["extern_kernels"]
    assert isinstance(names, list)
    assert isinstance(products, dict)
    for name in map(str, names):
        if name == native.EXTERN_KERNELS:
            provided[name] = native.extern_kernels(products)
        elif (library := container.files.get(f"kernels/{name}.so")) is not None:
            provided[name] = native.load_kernel(name, library)
        else:
            constant = io.BytesIO(container.files[f"constants/{name}"])
            provided[name] = torch.load(constant, weights_only=True)
    return native.Wrapper(container.text("wrapper.py"), provided, name="vllmc piece")


def _load_bundle(container: Container) -> PieceCallable:
    # Inductor is imported only where an artifact needs it.
    from vllmc.core.torch_compat import inductor

    bundle = inductor.load_bundle(container.files["bundle"])
    return lambda args: bundle(*args)


def _load_eager(container: Container) -> PieceCallable:
    imports = container.description["imports"]
    assert isinstance(imports, dict)
    namespace: dict[str, Any] = {}
    for name, path in imports.items():
        assert isinstance(path, list)
        namespace[name] = import_by_name(str(path[0]), str(path[1]))
    exec(compile(container.text("graph.py"), "<vllmc eager piece>", "exec"), namespace)
    forward: Callable[..., Sequence[Any]] = namespace["forward"]
    return lambda args: forward(None, *args)
