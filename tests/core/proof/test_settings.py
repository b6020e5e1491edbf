from __future__ import annotations

from typing import Any

import pytest

from vllmc.core.cache.key import Factor
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.graph.passes.manager import identity
from vllmc.core.passes import PassChoice, chosen
from vllmc.core.proof.settings import Setting, read_setting, with_settings
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.torch_compat.config import snapshot, vllmc_overrides
from vllmc.core.torch_compat.options import option_names


def setting(group: str, name: str, value: Any) -> Setting:
    return read_setting(Factor(group=group, name=name, value=value))


def refusal(group: str, name: str, value: Any) -> str:
    with pytest.raises(VllmcError) as caught:
        setting(group, name, value)
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("device", "cpu", "cpu"),
        ("dtype", "bfloat16", "bfloat16"),
        ("ranges", ["1:8", "9:64"], (CompileRange(1, 8), CompileRange(9, 64))),
        ("sizes", [4, 8], (4, 8)),
        ("dynamic_shapes", "backed", "backed"),
        ("layer_names", "baked", "baked"),
        ("experts", "grouped_mm", "grouped_mm"),
        ("splitting_ops", ["a::b"], ("a::b",)),
        ("split_kv_update", True, True),
        ("backend", "eager", "eager"),
    ],
)
def test_each_field_of_the_spec_is_read_from_its_factor(name: str, value: Any, field: Any) -> None:
    assert getattr(with_settings(CompileSpec(), [setting("spec", name, value)]), name) == field


def test_every_option_but_a_table_can_be_given_the_value_that_it_has() -> None:
    groups: tuple[Any, ...] = ("inductor", "functorch")
    for group in groups:
        for entry in snapshot(group, vllmc_overrides(CompileSpec())):
            if isinstance(entry.value, dict):
                assert "-O sets none" in refusal(group, entry.name, entry.value)
            else:
                setting(group, entry.name, entry.value)


def test_options_come_on_top_of_those_of_the_spec_in_their_order() -> None:
    spec = CompileSpec(inductor=(("max_autotune", True), ("size_asserts", True)))
    settings = [
        setting("inductor", "size_asserts", False),
        setting("inductor", "cpp.threads", 4),
        setting("functorch", "treat_parameters_as_free_to_save", False),
    ]
    changed = with_settings(spec, settings)
    assert changed.inductor == (("cpp.threads", 4), ("max_autotune", True), ("size_asserts", False))
    assert changed.functorch == (("treat_parameters_as_free_to_save", False),)


def test_ranges_and_sizes_are_set_at_once_and_must_not_contradict_each_other() -> None:
    no_ranges, size = setting("spec", "ranges", []), setting("spec", "sizes", [4])
    assert with_settings(CompileSpec(), [no_ranges, size]).sizes == (4,)
    with pytest.raises(UsageError):
        with_settings(CompileSpec(), [no_ranges])


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("versions", "another version"),
        ("system", "what this machine is"),
        ("environment", "a state of the process"),
        ("code", "vllmc's own code"),
        ("dynamo", "none of Dynamo's options"),
        ("model", "the model that was named"),
        ("sources", "those that are here"),
        ("novel", "nothing of the group 'novel'"),
    ],
)
def test_what_is_no_option_cannot_be_set_and_the_reason_says_why(group: str, words: str) -> None:
    assert words in refusal(group, "x", "y")


@pytest.mark.parametrize(
    "value",
    [
        f"path:{'0' * 64}",
        f"package.function#{'a' * 64}",
        [f"path:{'0' * 64}"],
        {"class": f"package.Pass#{'a' * 64}", "attributes": {}},
    ],
)
def test_a_value_known_by_its_digest_cannot_be_set(value: Any) -> None:
    assert "only a digest" in refusal("inductor", "post_grad_custom_pre_pass", value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float33"),
        ("dtype", "nn"),
        ("dtype", 5),
        ("device", "tpu"),
        ("sizes", ["4"]),
        ("dynamic_shapes", "some"),
        ("layer_names", None),
        ("experts", "eager"),
        ("split_kv_update", "true"),
        ("novel", 1),
    ],
)
def test_values_that_no_spec_has_are_refused(name: str, value: Any) -> None:
    assert refusal("spec", name, value) == "this vllmc does not know the value"


def test_an_option_that_torch_lacks_or_a_value_of_another_type_is_refused() -> None:
    assert "there is no option" in refusal("inductor", "max_autotune_everything", True)
    assert "is not a value" in refusal("inductor", "max_autotune", "yes")
    assert "no device" in refusal("spec", "device", "cuda:99")


@pytest.mark.skipif(
    "cpp.march" not in option_names("inductor"), reason="this torch has no cpp.march"
)
def test_code_for_another_cpu_is_not_asked_for() -> None:
    assert setting("inductor", "cpp.march", "native").value == "native"
    assert "may not run code" in refusal("inductor", "cpp.march", "x86-64-v9")


def test_a_pass_is_switched_on_off_or_limited_to_ranges() -> None:
    limited = PassChoice("norm-quant", CompileRange(1, 64))
    changed = with_settings(
        CompileSpec(passes=chosen(["no-ops", "norm-quant"], ["all"], "cpu")),
        [
            setting("passes", "no-ops", None),
            setting("passes", "norm-quant", identity(limited)),
            setting("passes", "activation-quant", identity(PassChoice("activation-quant"))),
        ],
    )
    assert changed.passes == (PassChoice("activation-quant"), limited)


def test_another_version_of_a_pass_cannot_be_set() -> None:
    told = identity(PassChoice("norm-quant"))
    assert "another version" in refusal("passes", "norm-quant", {**told, "version": 99})
    assert "another pass" in refusal("passes", "no-such-pass", told)
