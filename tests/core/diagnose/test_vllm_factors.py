from __future__ import annotations

from typing import Any

import pytest

from vllmc.core.diagnose.vllm_factors import (
    ENVIRONMENT,
    SPURIOUS,
    derived_key,
    key_facts,
    moving,
    release,
    spurious,
)


def facts(start: Any) -> Any:
    hashes = start.hashes
    return key_facts(
        start.env,
        {"config": hashes["cfg"], "code": hashes["code"], "compiler": hashes["comp"]},
    )


@pytest.mark.parametrize(
    ("env_hash", "key"),
    [
        ("0cfa4c7a2b3abde48b9ea648e9f9f070ef1fb2dc8e4130083a72bc3095ce185b", "3fbdd5227b"),
        ("4e34ece065a4cb49bcd167b4cbd29d014480db57b64aca6e298fdb1c09e51d51", "978868eca3"),
    ],
)
def test_the_key_is_the_one_that_vllm_made_of_published_hashes(env_hash: str, key: str) -> None:
    # From the two logs in ai-dynamo/dynamo#10695.
    hashes = {
        "config": "84b7dc96bd",
        "code": "1ae177648b277f38c700047b0bb3ce7c40cfa82da8797dcb4564d91b8bb533c9",
        "compiler": "a92dbc9a80",
    }
    assert derived_key(key_facts({}, hashes, env_hash)) == key


def test_the_key_needs_all_four_hashes() -> None:
    assert derived_key(key_facts({"A": 1}, {"config": "1", "code": "2"})) == ""
    assert derived_key(key_facts({}, {"config": "1", "code": "2", "compiler": "3"})) == ""


def test_every_variable_and_hash_is_a_factor(vllm_start: Any) -> None:
    found = facts(vllm_start)
    assert len(found.factors) == len(vllm_start.env) + 3
    assert {f.group for f in found.factors} == {
        ENVIRONMENT,
        "vllm.config",
        "vllm.code",
        "vllm.compiler",
    }
    assert all(f.affects_key for f in found.factors)
    assert found.env_hash == vllm_start.hashes["env"]
    assert derived_key(found) == vllm_start.key


def test_a_dump_that_does_not_make_its_hash_is_incomplete(vllm_start: Any) -> None:
    whole = key_facts(vllm_start.env, {}, vllm_start.hashes["env"])
    assert whole.complete
    partial = {k: v for k, v in vllm_start.env.items() if k != "CUDA_HOME"}
    assert not key_facts(partial, {}, vllm_start.hashes["env"]).complete


def test_a_secret_is_a_factor_without_its_value_or_its_digest() -> None:
    found = key_facts({"VLLM_API_KEY": "hunter2", "MY_URL": "https://u:hunter3@h/"}, {})
    assert [f.value for f in found.factors] == ["<redacted>", "<redacted>"]
    assert found.secrets == ("MY_URL", "VLLM_API_KEY")
    assert "hunter" not in repr(found)
    assert not any(digest in repr(found) for _, digest in found.hidden)


def test_every_spurious_variable_has_a_reason_and_a_remedy() -> None:
    assert all(s.reason and s.remedy and s.advice for s in SPURIOUS.values())
    assert "0.24 or later" in SPURIOUS["VLLM_NIXL_SIDE_CHANNEL_HOST"].advice


@pytest.mark.parametrize("name", ["VLLM_NEW_HOST", "VLLM_X_PORT", "VLLM_NODE_IPS"])
def test_a_variable_named_like_an_address_is_spurious(name: str) -> None:
    known = spurious(name)
    assert known is not None
    assert "by its name" in known.reason


@pytest.mark.parametrize("name", ["VLLM_USE_LAYERNAME", "VLLM_SUPPORT", "CUDA_HOME"])
def test_other_variables_are_not(name: str) -> None:
    assert spurious(name) is None


def test_a_spurious_variable_moves_the_key_unless_it_has_its_default(vllm_start: Any) -> None:
    assert moving(facts(vllm_start)) == (
        "VLLM_CONFIG_ROOT",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "VLLM_XLA_CACHE_PATH",
    )
    plain = vllm_start.change(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": "localhost"})
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" not in moving(facts(plain))


def test_the_release_is_told_by_the_variables(vllm_start: Any) -> None:
    names = set(vllm_start.env)
    assert release(names) == "after 0.15, before 0.24"
    later = names - {"VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_XLA_CACHE_PATH", "VLLM_API_KEY"}
    assert release(later | {"VLLM_ENABLE_HPC_OPS"}) == "after 0.28, before 0.33"
    later -= {"VLLM_RAY_BUNDLE_INDICES"}
    assert release(later | {"VLLM_ENABLE_HPC_OPS", "VLLM_P2P_MAX_PEERS"}) == "after 0.31"
    assert release({"VLLM_API_KEY"}) == "", "a few variables tell nothing"
