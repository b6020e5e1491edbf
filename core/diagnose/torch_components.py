"""The parts of torch's cache keys: what each is, and how two values of one differ.

Sources, torch 2.13 to 2.15: `FxGraphHashDetails` in torch/_inductor/codecache.py,
`AOTAutogradCacheDetails` in torch/_functorch/_aot_autograd/autograd_cache.py. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from vllmc.core.cache.explain import ChangeClass
from vllmc.core.cache.key import JsonValue, canonical_json
from vllmc.core.cache.redaction import redact
from vllmc.core.diagnose.reprs import value_of
from vllmc.core.diagnose.torch_caches import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a difference in a part of the key means, and what to say of it."""

    klass: ChangeClass
    says: str = ""


_OPTION: Final = Part(klass="codegen")
_PASS: Final = Part(klass="codegen", says="the id that a custom pass gives itself")
_KERNELS: Final = Part(klass="identity", says="the source of the user's Triton kernels")
_STORING: Final = Part(klass="surroundings", says="what is stored beside the code, not the code")

# In the order in which a difference is worth knowing: another torch brings other options with it,
# and options and inputs another graph.
_PARTS: Final[Mapping[str, Part]] = {
    "torch_version": Part(klass="codegen", says="torch's version and sources"),
    "system_info": Part(klass="codegen", says="the device and its toolchain"),
    "cache_key_tag": Part(klass="surroundings", says="a tag that was set to keep keys apart"),
    "autograd_config": _OPTION,
    "inductor_config": _OPTION,
    "inductor_config_comms": _OPTION,
    "custom_backend_codegen_configs": _OPTION,
    "deterministic_algorithms": _OPTION,
    "deterministic_algorithms_settings": _OPTION,
    "cuda_matmul_settings": _OPTION,
    "default_dtype": _OPTION,
    "autocast_state": _OPTION,
    "disable_amp": _OPTION,
    "grad_enabled": _OPTION,
    "cpp_runtime_thread_count": Part(klass="codegen", says="torch.get_num_threads()"),
    "region_activation_memory_budget": _OPTION,
    "region_activation_memory_budget_annotations": _OPTION,
    "nested_inductor_config_patches": _OPTION,
    "compile_on_one_rank": _OPTION,
    "custom_estimator_solver_uuids": _PASS,
    "cudagraph_override": _OPTION,
    "cudagraph_annotation": _OPTION,
    "pre_grad_custom_pass": _PASS,
    "joint_custom_pre_pass": _PASS,
    "joint_custom_post_pass": _PASS,
    "post_grad_custom_pre_pass": _PASS,
    "post_grad_custom_post_pass": _PASS,
    "custom_backend_passes": _PASS,
    "_pre_fusion_custom_pass": _PASS,
    "_post_fusion_custom_pass": _PASS,
    "_fuse_ddp_communication_passes": _PASS,
    "_custom_partitioner_fn": _PASS,
    "saved_tensors_hooks_fx_wrap_cache_hashes": _PASS,
    "sac_context_fn_hashes": _PASS,
    "provenance_tracking_level": _STORING,
    "provenance_tracking_to_timeline": _STORING,
    "precompile_enabled": _STORING,
    "fx_kwargs": Part(klass="codegen", says="what Inductor was called with"),
    "default_cuda_device_index": Part(klass="identity", says="the device, for want of an input"),
    "aot_config": Part(klass="identity", says="how AOTAutograd was called: arguments, parameters"),
    "act_input_paths": Part(klass="identity", says="which inputs are activations"),
    "example_inputs": Part(klass="identity", says="an input of the graph"),
    "var_to_hint_override": Part(klass="identity", says="sizes that the program hinted at"),
    "user_defined_triton_source": _KERNELS,
    "triton_kernel_source_codes": _KERNELS,
    "gm": Part(klass="identity", says="the graph itself"),
}
_FINER: Final[Mapping[str, Part]] = {
    "fx_kwargs[is_backward]": Part(klass="identity", says="a forward, or a backward graph"),
    "fx_kwargs[is_inference]": Part(klass="identity", says="with, or without a backward graph"),
    "fx_kwargs[static_input_idxs]": Part(klass="identity", says="which inputs never move"),
    "inductor_config[debug]": Part(klass="surroundings", says="only what is logged"),
    "inductor_config[disable_progress]": Part(klass="surroundings", says="only what is shown"),
    "inductor_config[verbose_progress]": Part(klass="surroundings", says="only what is shown"),
    "inductor_config[worker_log_path]": Part(klass="surroundings", says="only what is logged"),
    "inductor_config[torchinductor_worker_logpath]": Part(
        klass="surroundings", says="only what is logged"
    ),
}
_UNKNOWN: Final = Part(klass="unknown", says="a part of the key that vllmc does not know")
_RANKS: Final[Mapping[str, int]] = {name: rank for rank, name in enumerate(_PARTS)}

# Parts of which torch prints what no one can read: bytes, or a pickle.
_OPAQUE: Final = frozenset({"torch_version", "autograd_config"})
_SHOWN_LINES: Final = 20


def part_of(name: str) -> Part:
    """What the component `inductor_config[max_autotune].x` is a part of."""
    return _FINER.get(name) or _PARTS.get(_attribute(name), _UNKNOWN)


def rank_of(name: str) -> int:
    """The place of a component's difference among others; the one to read first has the least."""
    return _RANKS.get(_attribute(name), len(_RANKS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A leaf of a component, before and after; None where it is absent (`present` says where).

    `note` is what the values do not say.
    """

    component: str
    name: str
    before: JsonValue
    after: JsonValue
    present: tuple[bool, bool] = (True, True)
    note: str = ""


def readable(component: Component) -> JsonValue:
    """A component's value: JSON where torch prints one that can be read, else torch's hash."""
    return redact(component.name, _value(component))


def _value(component: Component) -> JsonValue:
    return _hash(component) if component.name in _OPAQUE else value_of(component.text)


def _hash(component: Component) -> str:
    return f"hash {component.digest}"


def differences(before: Iterable[Component], after: Iterable[Component]) -> tuple[Difference, ...]:
    """The leaves in which two sets of components differ, the ones to read first at the top."""
    left, right = ({c.name: c for c in side} for side in (before, after))
    found: list[Difference] = []
    for name in left.keys() | right.keys():
        one, other = left.get(name), right.get(name)
        if one is None or other is None:
            found.append(_absent(one, other))
        elif one.digest != other.digest:
            found += _leaves(one, other)
    return tuple(sorted(found, key=lambda d: (rank_of(d.name), d.name)))


def _attribute(name: str) -> str:
    return name.partition("[")[0].partition(".")[0]


def _absent(before: Component | None, after: Component | None) -> Difference:
    present = before or after
    assert present is not None, "a difference has at least one side"
    return Difference(
        component=present.name,
        name=present.name,
        before=readable(before) if before else None,
        after=readable(after) if after else None,
        present=(before is not None, after is not None),
    )


def _leaves(before: Component, after: Component) -> list[Difference]:
    name = before.name
    if name == "gm":
        return [_code(before, after)]
    note = "torch writes only a hash" if name in _OPAQUE else ""
    leaves = [
        Difference(
            component=name, name=leaf, before=redact(leaf, b), after=redact(leaf, a), note=note
        )
        for leaf, b, a in _compare(name, _value(before), _value(after))
    ]
    if leaves:
        return leaves
    return [
        Difference(
            component=name,
            name=name,
            before=_hash(before),
            after=_hash(after),
            note="what torch prints of both is the same; only the hash differs",
        )
    ]


def _compare(
    name: str, before: JsonValue, after: JsonValue
) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    """The leaves of two values that differ; an item that is missing is None."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _compare(f"{name}.{key}", before.get(key), after.get(key))
    elif _nested(before) and _nested(after) and len(before) == len(after):  # type: ignore[arg-type]
        for index, pair in enumerate(zip(before, after, strict=True)):  # type: ignore[arg-type]
            yield from _compare(f"{name}.{index}", *pair)
    elif canonical_json(before) != canonical_json(after):
        yield name, before, after


def _nested(value: JsonValue) -> bool:
    """Whether a list is of more than plain items, so that its items are compared one by one."""
    return isinstance(value, list) and any(isinstance(item, list | dict) for item in value)


def _code(before: Component, after: Component) -> Difference:
    """The lines in which the code of two graphs differs, from the first such line to the last."""
    left, right = (
        [line.strip() for line in side.text.split("\n") if line.strip()] for side in (before, after)
    )
    if left == right:
        note = "the code is the same; the hash covers more than it (constants, the module's class)"
        return Difference(
            component="gm", name="gm", before=_hash(before), after=_hash(after), note=note
        )
    start = _common(left, right)
    end = _common(left[start:][::-1], right[start:][::-1])
    removed, added = left[start : len(left) - end], right[start : len(right) - end]
    return Difference(
        component="gm",
        name="gm",
        before=_excerpt(removed),
        after=_excerpt(added),
        note=f"from line {start + 1} of {len(left)} on",
    )


def _common(left: list[str], right: list[str]) -> int:
    """How many lines two lists begin with in common."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _excerpt(lines: list[str]) -> JsonValue:
    shown = [*lines[:_SHOWN_LINES], "..."] if len(lines) > _SHOWN_LINES else lines
    return redact("gm", "\n".join(shown))
