from __future__ import annotations

import threading

import torch

from vllmc.core.models.building import weights_of


def test_real_weights_are_made_while_no_other_thread_makes_fake_ones() -> None:
    """Transformers turns initialization off for the whole process."""
    made = []

    def make() -> None:
        with weights_of("real", "cpu", 7):
            made.append(torch.nn.Linear(8, 8))

    make()
    thread = threading.Thread(target=make)
    with weights_of("fake", "cpu", 0):
        thread.start()
        thread.join(0.2)
        torch.nn.Linear(8, 8)
    thread.join()
    assert torch.equal(made[0].weight, made[1].weight)
