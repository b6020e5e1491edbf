"""What the linears of a model are given while it runs: which are given the same, and how large."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch

from vllmc.core.declare.declaration import declaration_of
from vllmc.core.declare.examples import example_values
from vllmc.core.declare.session import plainly
from vllmc.core.models.building import on_fake_experts
from vllmc.core.torch_compat.fake import faking


@contextlib.contextmanager
def watching(
    model: torch.nn.Module, paths: Collection[str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Within it, `see` is told what each of the modules at `paths` below `model` is called with."""

    def watch(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: see(path, *args, *kwargs.values())

    hooks = [
        model.get_submodule(p).register_forward_pre_hook(watch(p), with_kwargs=True) for p in paths
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def groups_by_input(
    entry: torch.nn.Module, model: torch.nn.Module, paths: Collection[str], device: str
) -> list[list[str]]:
    """The linears at `paths` below `model`, in groups of those that are given one tensor.

    `entry` calls the model. It is run once on fake tensors, so that nothing is computed and real
    weights are not looked at. What is never called is in no group.
    """
    # Kept, so that no other tensor takes the address of one.
    seen: list[tuple[torch.Tensor, str]] = []
    declaration = declaration_of(entry)
    assert declaration is not None, f"{type(entry).__name__} is no entry"
    with (
        torch.device(device),
        faking(entry),
        plainly(),
        on_fake_experts(model),
        torch.no_grad(),
        watching(model, paths, lambda path, x: seen.append((x, path))),
    ):
        entry(**example_values(type(model).__name__, entry, declaration))
    groups: dict[object, list[str]] = {}
    for tensor, path in seen:
        # A linear that is called more than once joins what it is called with.
        own = groups.setdefault(path, [path])
        group = groups.setdefault(id(tensor), own)
        if group is not own:
            group += own
            groups |= dict.fromkeys([key for key in groups if groups[key] is own], group)
    return list({id(group): group for group in groups.values()}.values())
