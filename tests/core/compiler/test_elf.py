from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.compiler.container import unpack
from vllmc.core.compiler.elf import loadable_part

SOURCE = """
#include <cmath>
static double table[100] = {1, 2, 3};
static double zeros[10000];
extern "C" double look_up(int place) {
    zeros[place] += 1;
    return sqrt(table[place]) + zeros[place];
}
"""


@pytest.fixture
def library(tmp_path: Path) -> bytes:
    source, result = tmp_path / "source.cpp", tmp_path / "whole.so"
    source.write_text(SOURCE)
    command = ["g++", "-g", "-shared", "-fPIC", "-o", str(result), str(source)]
    subprocess.run(command, check=True)
    return result.read_bytes()


def test_a_library_loads_without_its_debugging_symbols(library: bytes, tmp_path: Path) -> None:
    part = loadable_part(library)
    assert b".debug_info" in library
    assert str(tmp_path).encode() in library
    assert b".debug_info" not in part
    assert str(tmp_path).encode() not in part
    # What the loader maps is untouched.
    assert part[64:] == library[64 : len(part)]
    file = tmp_path / "part.so"
    file.write_bytes(part)
    look_up = ctypes.CDLL(str(file)).look_up
    look_up.restype = ctypes.c_double
    assert [look_up(place) for place in (0, 0, 3)] == [2.0, 3.0, 1.0]


def test_it_is_the_same_a_second_time(library: bytes) -> None:
    once = loadable_part(library)
    assert loadable_part(once) == once


@pytest.mark.parametrize("data", [b"", b"no library", b"\x7fELF\x01\x01" + bytes(90)])
def test_another_kind_of_file_is_left_as_it_is(data: bytes) -> None:
    assert loadable_part(data) == data


def test_kernels_are_stored_so(link_toy: Any, ops: Any) -> None:
    toy = link_toy(lambda e, x, p, r: ops.cut(x).sin() * 2, backend="inductor")
    toy.check(1, 2, 17, 64)
    kernels = [
        data
        for made in toy.artifacts.values()
        for name, data in unpack(made.artifact).files.items()
        if name.endswith(".so")
    ]
    assert kernels
    assert all(loadable_part(kernel) == kernel for kernel in kernels)
