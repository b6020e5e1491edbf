import subprocess
import sys

# What it guards against is a crash.
FIRST_IN_A_THREAD = """
import threading

import torch

from vllmc.core.torch_compat.fake import fake_weights


def make():
    with fake_weights():
        return torch.ones(2)


for number in range(3):
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    used_again = [bytes(size) for size in range(3000)]
print(make().shape)
"""


def test_a_thread_that_ends_may_be_the_first_to_make_fake_tensors() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IN_A_THREAD], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "torch.Size([2])\n"), done.stderr
