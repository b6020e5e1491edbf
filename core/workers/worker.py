"""What a worker does: one order, carried out under the very settings that it names."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Iterable

import torch

from vllmc.core.cache.factors import check_in_force
from vllmc.core.compiler.protocol import Unit
from vllmc.core.compiler.registry import find_compiler
from vllmc.core.errors import VllmcError
from vllmc.core.graph.travel import unpack_piece
from vllmc.core.torch_compat.config import applied, cxx_candidates, vllmc_overrides
from vllmc.core.torch_compat.warm_up import limit_compilers
from vllmc.core.workers.frames import Answer, Declined, Done, Failed, Order


def carry_out(order: Order) -> Answer:
    """Compiles the unit, or declines: never compiles under other settings than the order's."""
    try:
        unit = _prepare(order)
        if isinstance(unit, Declined):
            return unit
        with applied(vllmc_overrides(order.spec)):
            return _compile(unit, order)
    except Exception:  # noqa: BLE001 - whoever sent the order meets the error in compiling it
        return Declined(reason=f"a worker failed: {traceback.format_exc()}")


def _prepare(order: Order) -> Unit | Declined:
    sys.path[:] = order.path
    torch.set_num_threads(order.threads)
    limit_compilers(order.compilers)
    try:
        _import(order.piece["modules"])
        if not _in_force(order):
            # The model's own code may have set torch's options as it was imported.
            _import(order.modules)
        check_in_force(order.factors, order.spec, code=True)
        piece = unpack_piece(order.piece)
    except (VllmcError, ImportError) as error:
        return Declined(reason=str(error))
    if cxx_candidates(vllmc_overrides(order.spec)) != order.cxx:
        return Declined(reason="a worker would use another C++ compiler")
    return Unit(piece=piece, range=order.range)


def _import(modules: Iterable[str]) -> None:
    for name in modules:
        importlib.import_module(name)


def _in_force(order: Order) -> bool:
    try:
        check_in_force(order.factors, order.spec)
    except VllmcError:
        return False
    return True


def _compile(unit: Unit, order: Order) -> Answer:
    started = time.perf_counter()
    try:
        compiled = find_compiler(order.spec.backend).compile(unit, order.spec, texts=order.texts)
    except VllmcError as error:
        return Failed(
            kind=type(error).__name__,
            code=error.code,
            message=error.message,
            context=error.context,
            hint=error.hint,
            trace=traceback.format_exc(),
        )
    return Done(compiled=compiled, seconds=time.perf_counter() - started)
