from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllmc.core.torch_compat.native import Wrapper, extern_kernels, load_kernel

KERNEL = r"""
#include <Python.h>
#include <cstdlib>
static PyObject* kernel(PyObject*, PyObject*) { return PyLong_FromLong(NUMBER); }
static PyMethodDef methods[] = {{"kernel", kernel, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernel", NULL, -1, methods};
PyMODINIT_FUNC PyInit_kernel(void) {
    // As Inductor's kernels do: the address of torch's data-pointer function must be told.
    if (!std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR")) return NULL;
    return PyModule_Create(&module);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """The bytes of a kernel that returns a number."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    import sysconfig

    directory = tmp_path_factory.mktemp("kernels")

    def make(number: int) -> bytes:
        source, target = directory / f"{number}.cpp", directory / f"{number}.so"
        source.write_text(KERNEL)
        command = [compiler, "-shared", "-fPIC", f"-DNUMBER={number}"]
        include = f"-I{sysconfig.get_paths()['include']}"
        subprocess.run([*command, include, str(source), "-o", str(target)], check=True)
        return target.read_bytes()

    return make


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_kernels_of_one_name_are_kept_apart(library: Callable[[int], bytes]) -> None:
    # The dynamic loader knows libraries by their path, and descriptors are numbered again.
    kernels = [load_kernel("cpp_fused_0", library(number)) for number in (1, 2, 3)]
    assert [kernel() for kernel in kernels] == [1, 2, 3]


def test_a_loaded_kernel_holds_no_descriptor_open(library: Callable[[int], bytes]) -> None:
    data = library(4)
    load_kernel("cpp_fused_0", data)
    before = open_descriptors()
    kernels = [load_kernel("cpp_fused_0", data) for _ in range(20)]
    assert open_descriptors() == before
    assert {kernel() for kernel in kernels} == {4}


@pytest.mark.parametrize("data", [b"", b"no library", b"\x7fELF" + bytes(200)])
def test_what_is_no_library_is_an_import_error(data: bytes) -> None:
    before = open_descriptors()
    with pytest.raises(ImportError):
        load_kernel("kernel", data)
    assert open_descriptors() == before


def test_a_wrapper_is_run_with_what_is_provided() -> None:
    call = Wrapper(
        "def call(args):\n    (x,) = args\n    args.clear()\n    return (double(x), __name__)\n",
        {"double": lambda x: x * 2},
        name="toy",
    )
    args = [3]
    assert call(args) == (6, "toy")
    assert args == []


def test_library_calls_are_torch_functions_under_the_wrappers_names() -> None:
    found = extern_kernels({"mm": "mm", "mm_dtype": "mm", "_grouped_mm": "_grouped_mm"})
    assert found.mm is torch.mm
    assert found.mm_dtype is torch.mm
    with pytest.raises(AttributeError):
        extern_kernels({"mm": "no_such_function"})


def test_the_environment_that_kernels_read_names_this_process(
    library: Callable[[int], bytes],
) -> None:
    load_kernel("kernel", library(5))
    address = os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"]
    assert int(address) == torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr
