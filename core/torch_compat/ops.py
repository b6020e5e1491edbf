"""Where the implementations of a custom op stand: what its name does not say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import torch
from torch._library.custom_ops import OPDEFS
from torch._library.simple_registry import singleton

_REGISTERED = re.compile(r"registered at (?P<file>/.+?):(?P<line>\d+)")
_COVERED = ("aten::", "prims::", "vllmc::")
_OF_TORCH = Path(torch.__file__).parent


def registrations(name: str) -> tuple[tuple[str, int], ...]:
    """The file and line of each Python implementation of the op `namespace::name`, fake ones too.

    Those of all its overloads, without those of torch and of vllmc, which are factors of their own.
    What a library of C++ registers has no file here, and is not among them. Raises `LookupError`
    for an op that is not registered.
    """
    if name.startswith(_COVERED):
        return ()
    namespace, _, op = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if packet is None:
        raise LookupError(name)
    overloads = (name if o == "default" else f"{name}.{o}" for o in packet.overloads())
    found = {
        (file, line)
        for overload in overloads
        for file, line in _places(overload)
        if not Path(file).is_relative_to(_OF_TORCH) and Path(file).is_file()
    }
    return tuple(sorted(found))


def declared_by_signature(name: str) -> bool:
    """Whether `torch.library.custom_op` made the schema of `namespace::name` from a function."""
    return name in OPDEFS


def _places(name: str) -> Iterator[tuple[str, int]]:
    fake = singleton.find(name).fake_impl.kernel
    told = [torch._C._dispatch_dump(name)]
    if fake is not None:
        told.append(f"registered at {fake.source}")
    for found in _REGISTERED.finditer("\n".join(told)):
        yield found["file"], int(found["line"])
    defined = OPDEFS.get(name)
    # Kernels for one device are wrapped; the function within has the place.
    functions = (
        [] if defined is None else [defined._init_fn, defined._abstract_fn, *_kernels(defined)]
    )
    for function in functions:
        if isinstance(function, FunctionType):
            yield function.__code__.co_filename, function.__code__.co_firstlineno


def _kernels(defined: torch._library.custom_ops.CustomOpDef) -> Iterator[object]:
    for kernel in defined._backend_fns.values():
        for cell in kernel.__closure__ or ():
            yield cell.cell_contents
