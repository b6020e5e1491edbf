from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch._inductor.config
from torch._inductor import cpp_builder
from torch._inductor.cpu_vec_isa import VecISA
from torch._inductor.exc import CppCompileError

from vllmc.core.torch_compat.cxx_calls import change_calls

_NEVER_COMPILES = "#error this is not compiled"


@pytest.fixture(autouse=True)
def _changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    change_calls()


def probe(flags: str) -> bool:
    isa: Any = VecISA()
    isa._arch_flags, isa._macro = flags, []
    return bool(isa.check_build(_NEVER_COMPILES))


def test_an_extension_is_usable_where_the_compiler_knows_its_flags() -> None:
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        assert probe("-O1")
        assert not probe("-mno-such-extension")


def test_without_the_option_inductor_compiles_its_test_program() -> None:
    with torch._inductor.config.patch({"cpp.vec_isa_ok": None}):
        assert not probe("-O1")


def test_a_compiled_file_does_not_name_the_directory_that_it_was_compiled_in(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text('extern "C" const char *where() { return __FILE__; }\n')
    cpp_builder.run_compile_cmd(f"g++ -shared -fPIC {source} -o {target}", str(tmp_path))
    assert str(tmp_path).encode() not in target.read_bytes()
    assert b"kernel.cpp" in target.read_bytes()
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_of_a_file_that_does_not_compile_nothing_is_left(tmp_path: Path) -> None:
    source, target = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    source.write_text(_NEVER_COMPILES)
    with pytest.raises(CppCompileError):
        cpp_builder.run_compile_cmd(f"g++ -shared -fPIC {source} -o {target}", str(tmp_path))
    assert list(tmp_path.iterdir()) == [source]
