"""The GitLab template and the examples: their commands are run, their YAML is read."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
Bash = Callable[..., Any]


@pytest.fixture
def job() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "ci" / "gitlab-prewarm.yml").read_text())
    [(name, job)] = found.items()
    assert name == ".vllmc-prewarm"
    return job


def test_gitlab_s_job_warms_checks_and_leaves_its_reports(
    job: dict[str, Any], bash: Bash, workplace: Path
) -> None:
    (workplace / "warm.toml").write_text('[[warm]]\nmodel = "tiny-llama"\nlayers = 1\n')
    env = {"CI_PROJECT_DIR": str(workplace), "GITLAB_CI": "true"}
    variables = {
        name: value.replace("$CI_PROJECT_DIR", str(workplace))
        for name, value in job["variables"].items()
    }
    env |= variables | {"PREWARM_INSTALL": ""}
    # As a runner unpacks it.
    cache = workplace / ".vllmc-cache"
    cache.mkdir()
    cache.chmod(0o777)
    done = bash("\n".join([*job["before_script"], *job["script"]]), env)
    assert done.code == 0, done.err
    assert "2 compiled" in done.out
    assert "would-hit" in done.out
    assert not cache.stat().st_mode & stat.S_IWOTH
    for report in job["artifacts"]["reports"].values():
        assert (workplace / report).is_file()
    assert json.loads((workplace / job["artifacts"]["reports"]["codequality"]).read_text()) == []


def test_gitlab_caches_only_what_lies_in_the_project(job: dict[str, Any]) -> None:
    [path] = job["cache"]["paths"]
    assert job["variables"]["VLLMC_CACHE_DIR"] == f"$CI_PROJECT_DIR/{path.rstrip('/')}"
    assert job["cache"]["when"] == "always"


def test_gitlab_checks_what_pruning_left(job: dict[str, Any]) -> None:
    [prune] = [at for at, line in enumerate(job["script"]) if "cache prune" in line]
    [check] = [at for at, line in enumerate(job["script"]) if "--check" in line]
    assert prune < check
    assert job["variables"]["PREWARM_INSTALL"] == "", "no name that anyone may register"


@pytest.fixture
def dockerfile() -> str:
    return (ROOT / "examples" / "docker" / "Dockerfile").read_text()


def test_the_image_is_checked_last_as_the_user_who_serves(dockerfile: str) -> None:
    assert dockerfile.endswith("USER server\nRUN vllmc warm --from warm.toml --check\n")


@pytest.mark.thorough
def test_what_is_baked_can_be_read_by_all_and_written_by_its_owner(
    dockerfile: str, bash: Bash, workplace: Path
) -> None:
    (workplace / "warm.toml").write_text((ROOT / "examples/docker/warm.toml").read_text())
    lines = re.findall(r"^RUN ((?:\\\n|.)*vllmc warm(?:\\\n|.)*)$", dockerfile, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        done = bash(line.replace("/tmp/inductor", str(workplace / "inductor")))
        assert done.code == 0, done.err
    cache = workplace / ".vllmc-cache"
    for path in (cache, *cache.rglob("*")):
        mode = path.stat().st_mode
        wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
        assert mode & wanted == wanted, path
        assert not mode & (stat.S_IWGRP | stat.S_IWOTH), path


@pytest.fixture
def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    path = ROOT / "examples" / "kubernetes" / "warm-before-serving.yaml"
    config, pod = yaml.safe_load_all(path.read_text())
    return config, pod["spec"]


def test_kubernetes_has_one_user_and_one_cache_that_the_server_only_reads(
    kubernetes: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    config, pod = kubernetes
    [warm], [serve] = pod["initContainers"], pod["containers"]
    assert warm["env"] == serve["env"]
    assert set(pod["securityContext"]) == {"runAsNonRoot", "runAsUser"}
    mounts = {mount["name"]: mount for mount in serve["volumeMounts"]}
    assert mounts["cache"]["readOnly"]
    [directory] = [v["value"] for v in serve["env"] if v["name"] == "VLLMC_CACHE_DIR"]
    assert Path(directory).parent == Path(mounts["cache"]["mountPath"])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(volumes) == {mount["name"] for mount in warm["volumeMounts"]}
    assert volumes["warm"]["configMap"]["name"] == config["metadata"]["name"]


@pytest.mark.thorough
def test_kubernetes_warms_what_it_serves(
    kubernetes: tuple[dict[str, Any], dict[str, Any]], bash: Bash, workplace: Path
) -> None:
    config, pod = kubernetes
    for name, text in config["data"].items():
        (workplace / name).write_text(text)
    [warm], [serve] = pod["initContainers"], pod["containers"]
    for container in (warm, serve):
        words = [word.replace("/etc/vllmc", str(workplace)) for word in container["command"]]
        done = bash(" ".join(words))
        assert done.code == 0, done.err
