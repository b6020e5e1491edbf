"""How Inductor calls the C++ compiler, changed in two places for good.

It compiles, links and loads a test program for each extension of the instruction set (AVX-512's
bfloat16, AMX), 0.4 s apiece, even where `cpp.vec_isa_ok` says that the set itself is fine. What the
CPU can do, torch knows; here the compiler is only asked whether it knows the flags.

And `__FILE__`, which kernels hold in their checks of an index, names the directory that was
compiled in. Here that directory is left out, so that an artifact's bytes do not depend on it.
"""

from __future__ import annotations

import shlex
import subprocess

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


def _run_with_short_paths(cmd_line: str, cwd: str) -> None:
    # Not among the flags that Inductor keeps: they are part of the name of what is compiled.
    directory = cache_dir()
    if directory in cmd_line:
        cmd_line += f" {shlex.quote(f'-ffile-prefix-map={directory}/=')}"
    _run_as_it_is(cmd_line, cwd)


def change_calls() -> None:
    """Changes both. An exchange for the time of a compilation would meet those of other threads."""
    VecISA.check_build = _check_flags
    cpp_builder.run_compile_cmd = _run_with_short_paths
