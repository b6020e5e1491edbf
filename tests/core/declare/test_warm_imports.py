"""What a fresh process imports to run a declared module whose program is stored."""

import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import sys
import torch
from vllmc.core import CompileSpec, compiling, support_torch_compile

@support_torch_compile(dynamic_arg_dims={"x": 0})
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).relu()

with compiling(CompileSpec(device="auto", dtype="auto", backend="eager"), cache_dir=sys.argv[1]):
    model = Model().eval()
assert model(torch.randn(3, 4)).shape == (3, 4)
heavy = ("sympy", "torch._dynamo", "torch._inductor", "transformers", "triton")
print(*(name for name in heavy if name in sys.modules))
"""


def test_a_stored_program_is_run_without_what_compiled_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    # When a process began is known to a hundredth of a second: what changed by then may have
    # changed later, and is looked at again.
    time.sleep(0.1)
    loaded = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=True,
        )
        loaded.append(done.stdout.split())
    cold, warm = loaded
    assert {"sympy", "torch._dynamo"} <= set(cold)
    assert warm == []
