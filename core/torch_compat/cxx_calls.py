"""How Inductor calls the C++ compiler, changed in three places for good.

It compiles, links and loads a test program for each extension of the instruction set (AVX-512's
bfloat16, AMX), 0.4 s apiece, even where `cpp.vec_isa_ok` says that the set itself is fine. What the
CPU can do, torch knows; here the compiler is only asked whether it knows the flags.

`__FILE__`, which kernels hold in their checks of an index, names the directory that was compiled
in. Here that directory is left out, so that an artifact's bytes do not depend on it.

And a file of that name is taken for compiled: one that a compiler was killed over would stay for
ever. Here it gets its name when it is whole.
"""

from __future__ import annotations

import secrets
import shlex
import subprocess
from pathlib import Path

from torch._inductor import config, cpp_builder
from torch._inductor.cpu_vec_isa import VecISA
from torch._inductor.runtime.cache_dir_utils import cache_dir

_check_by_compiling = VecISA.check_build
_run_as_it_is = cpp_builder.run_compile_cmd


def _check_flags(self: VecISA, code: str) -> bool:
    if not config.cpp.vec_isa_ok:
        return bool(_check_by_compiling(self, code))
    compiler = cpp_builder.get_cpp_compiler()
    asked = [compiler, *self.build_arch_flags().split(), "-E", "-x", "c++", "/dev/null"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def _run(cmd_line: str, cwd: str) -> None:
    # Not among the flags that Inductor keeps: those are part of the name of what is compiled.
    words = [*shlex.split(cmd_line), f"-ffile-prefix-map={cache_dir()}/="]
    place = words.index("-o") + 1
    target = Path(cwd, words[place])
    words[place] = f"{target}.{secrets.token_hex(8)}"
    try:
        _run_as_it_is(shlex.join(words), cwd)
        Path(words[place]).replace(target)
    finally:
        Path(words[place]).unlink(missing_ok=True)


def change_calls() -> None:
    """Changes them. An exchange for the time of a compilation would meet those of other threads."""
    VecISA.check_build = _check_flags
    cpp_builder.run_compile_cmd = _run
