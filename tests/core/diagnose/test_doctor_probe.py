from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllmc.core.cache.key import REDACTED
from vllmc.core.cache.trust import Trust
from vllmc.core.diagnose.doctor_facts import Facts
from vllmc.core.diagnose.doctor_places import Named
from vllmc.core.diagnose.doctor_probe import Configured, gather

KNOWN = ("VLLMC_CACHE_DIR", "VLLMC_DTYPE", "VLLMC_CONFIG")


def facts_of(cache: Path, *below: Path, **environment: str) -> Facts:
    """The facts under these variables, with no program to be found."""
    configured = Configured(
        layers=[Named(path=path, given=str(path), origin="flag") for path in (cache, *below)],
        trust=Trust(),
        config_file=None,
        config_named=False,
        known_variables=KNOWN,
    )
    return gather(configured, {"PATH": "", **environment})


def test_the_first_directory_is_written_to_and_the_others_are_read(tmp_path: Path) -> None:
    found = facts_of(tmp_path / "a", tmp_path / "b", tmp_path)
    assert [(layer.place.path, layer.role) for layer in found.layers] == [
        (str(tmp_path / "a"), "written"),
        (str(tmp_path / "b"), "read"),
        (str(tmp_path), "read"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_user_is_the_one_who_runs_it_and_home_is_what_is_set(tmp_path: Path) -> None:
    found = facts_of(tmp_path, HOME="/home/ada", SUDO_USER="ada").user
    assert (found.uid, found.home, found.sudo_user) == (os.geteuid(), "/home/ada", "ada")
    assert facts_of(tmp_path).user.home is None
    assert facts_of(tmp_path, HOME="").user.home is None


@pytest.mark.parametrize(
    ("variables", "ci"),
    [
        ({"CI": "true", "GITHUB_ACTIONS": "true"}, "GitHub Actions"),
        ({"CI": "true", "GITLAB_CI": "true"}, "GitLab CI"),
        ({"CI": "1"}, "CI"),
        ({"CI": "false"}, ""),
        ({}, ""),
    ],
)
def test_ci_is_told_by_its_variables(tmp_path: Path, variables: dict[str, str], ci: str) -> None:
    assert facts_of(tmp_path, **variables).ci == ci


def test_kubernetes_is_told_by_its_variable(tmp_path: Path) -> None:
    found = facts_of(tmp_path, KUBERNETES_SERVICE_HOST="10.0.0.1", container="oci")
    assert found.container == "Kubernetes"


def test_variables_that_may_be_in_a_key_are_kept_and_others_are_not(tmp_path: Path) -> None:
    found = facts_of(
        tmp_path,
        TORCHINDUCTOR_MAX_AUTOTUNE="1",
        TORCHDYNAMO_VERBOSE="1",
        TRITON_PTXAS_PATH="/opt/ptxas",
        ATEN_CPU_CAPABILITY="avx2",
        TORCHINDUCTOR_CACHE_DIR="/scratch",
        TORCHINDUCTOR_COMPILE_THREADS="8",
        POD_IP="10.1.2.3",
    )
    assert set(found.variables) == {
        *("ATEN_CPU_CAPABILITY", "TORCHDYNAMO_VERBOSE", "TORCHINDUCTOR_MAX_AUTOTUNE"),
        "TRITON_PTXAS_PATH",
    }


def test_secrets_in_variables_are_redacted(tmp_path: Path) -> None:
    found = facts_of(
        tmp_path, TORCHINDUCTOR_REMOTE_TOKEN="hunter2", TORCHINDUCTOR_X="hf_" + "a1B2" * 8
    )
    assert set(found.variables.values()) == {REDACTED}


def test_a_misspelt_variable_comes_with_the_one_that_is_meant(tmp_path: Path) -> None:
    found = facts_of(tmp_path, VLLMC_CACHEDIR="/x", VLLMC_ZZZ="1", VLLMC_DTYPE=" ", VLLM_X="1")
    assert found.unknown_variables == {"VLLMC_CACHEDIR": "VLLMC_CACHE_DIR", "VLLMC_ZZZ": ""}
    assert found.empty_variables == ("VLLMC_DTYPE",)


def test_inductor_compiles_where_its_variable_says(tmp_path: Path) -> None:
    named = facts_of(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    assert named.temporary is not None
    assert named.temporary.path == str(tmp_path / "inductor")
    plain = facts_of(tmp_path)
    assert plain.temporary is not None
    assert plain.temporary.path == plain.temporary_files


def test_the_hubs_cache_is_where_huggingface_hub_looks_for_it(tmp_path: Path) -> None:
    def path(**environment: str) -> str:
        return facts_of(tmp_path, **environment).hub.path

    assert path(HF_HUB_CACHE="/hub", HF_HOME="/hf") == "/hub"
    assert path(HF_HOME="/hf", XDG_CACHE_HOME="/c") == "/hf/hub"
    assert path(XDG_CACHE_HOME="/c", HOME="/home/ada") == "/c/huggingface/hub"
    assert path(HOME="/home/ada") == "/home/ada/.cache/huggingface/hub"
    assert path(HF_HOME="~nonesuch/hf") == "~nonesuch/hf/hub"


def test_the_first_process_was_started_before_this_one(tmp_path: Path) -> None:
    started = facts_of(tmp_path).started
    assert started is None or 0 < started < time.time()
