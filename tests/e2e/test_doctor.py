"""The console script on machines that are odd for real: their own mounts, users, packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.layout import Layout

Run = Callable[..., Any]


def _has_namespaces() -> bool:
    if sys.platform != "linux":
        return False
    try:
        tried = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "t", "/mnt"],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    return tried.returncode == 0


in_a_namespace = pytest.mark.skipif(not _has_namespaces(), reason="needs mounts of its own")


def after(script: str) -> tuple[str, ...]:
    """What runs a command after a shell script, among mounts of its own."""
    return ("unshare", "-rm", "sh", "-ec", f'{script}; exec "$@"', "sh")


def ids(done: Any) -> set[str]:
    assert "Traceback" not in done.err + done.out
    assert done.err == ""
    found = {finding["id"] for finding in done.json["findings"]}
    assert done.code == (3 if any(f["level"] == "problem" for f in done.json["findings"]) else 0)
    return found


@in_a_namespace
def test_a_cache_on_a_tmpfs_is_found_in_memory(spawn: Run, cache: Path) -> None:
    cache.mkdir()
    done = spawn("doctor", "--json", before=after(f"mount -t tmpfs -o mode=700 t {cache}"))
    assert {"cache-in-memory", "cache-empty"} <= ids(done)
    assert done.code == 3


@in_a_namespace
def test_a_user_that_nobody_knows_and_no_home_are_told_what_to_set(spawn: Run) -> None:
    """As in a pod that runs as any user id: there is no place that could be the default."""
    unknown = ("unshare", "--user", "--map-user=4321", "env", "-u", "HOME")
    done = spawn("doctor", env={"VLLMC_CACHE_DIR": ""}, before=unknown)
    assert (done.code, done.error) == (1, "no-home-directory")
    assert "VLLMC_CACHE_DIR names" in done.err
    assert "home-unset" not in ids(spawn("doctor", "--json", before=unknown))


@in_a_namespace
def test_a_read_only_cache_is_a_problem_when_empty_and_none_when_warm(
    spawn: Run, cache: Path
) -> None:
    record = Layout(cache).program(sha256_hex("program"), sha256_hex("record"))
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    read_only = f"mount --bind {cache} {cache} && mount -o remount,ro,bind {cache}"
    warm = spawn("doctor", "--json", before=after(read_only))
    assert "cache-read-only" in ids(warm)
    assert warm.json["facts"]["layers"][0]["programs"] == 1
    hidden = f"mount -t tmpfs -o ro t {cache}"
    assert {"cache-not-writable", "cache-empty"} <= ids(
        spawn("doctor", "--json", before=after(hidden))
    )


@in_a_namespace
def test_a_cache_on_an_overlay_is_lost_with_its_container(spawn: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    overlay = (
        f"mkdir {tmp_path}/d && mount -t tmpfs t {tmp_path}/d && cd {tmp_path}/d && mkdir l u w && "
        f"mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w {tmp_path}/cache && cd /"
    )
    assert "cache-in-container-layer" in ids(spawn("doctor", "--json", before=after(overlay)))


@in_a_namespace
def test_a_volume_is_known_by_what_is_mounted_there(
    spawn: Run, cache: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "pods" / "1f0c" / "volumes" / "kubernetes.io~empty-dir" / "cache"
    volume.mkdir(parents=True)
    cache.mkdir()
    mounted = spawn("doctor", "--json", before=after(f"mount --bind {volume} {cache}"))
    assert "cache-in-pod-volume" in ids(mounted)
    assert "cache-in-pod-volume" not in ids(spawn("doctor", "--json"))


@in_a_namespace
def test_a_full_disk_is_a_problem(spawn: Run, cache: Path) -> None:
    cache.mkdir()
    full = f"mount -t tmpfs -o size=1m,mode=700 t {cache}"
    assert "cache-disk-full" in ids(spawn("doctor", "--json", before=after(full)))


@in_a_namespace
def test_compiling_on_noexec_is_a_warning(spawn: Run, tmp_path: Path) -> None:
    place = tmp_path / "inductor"
    place.mkdir()
    noexec = f"mount -t tmpfs -o noexec t {place}"
    done = spawn(
        "doctor",
        "--json",
        before=after(noexec),
        env={"TORCHINDUCTOR_CACHE_DIR": str(place)},
    )
    assert "temporary-directory-noexec" in ids(done)


@in_a_namespace
def test_without_proc_it_says_that_no_kernel_can_be_loaded(spawn: Run, cache: Path) -> None:
    cache.mkdir(mode=0o700)
    done = spawn("doctor", "--json", before=after("mount -t tmpfs t /proc"))
    assert "kernels-cannot-be-loaded" in ids(done)
    assert done.json["facts"]["layers"][0]["place"]["mount"] is None


def test_without_a_home_the_password_file_decides(start: Any, tmp_path: Path) -> None:
    home = ("env", "-u", "HOME", "-u", "VLLMC_CACHE_DIR", "-u", "XDG_CACHE_HOME")
    process = start("doctor", "--json", before=home)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    assert '"home-unset"' in out


def test_a_torch_that_cannot_be_imported_is_no_obstacle(spawn: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: not found')\n")
    paths = [str(broken.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = spawn("doctor", "--json", env={"PYTHONPATH": os.pathsep.join(paths)})
    assert "package-mixed" in ids(done)
    assert done.json["facts"]["packages"][0]["file_version"] is None


def test_an_empty_environment_is_no_obstacle(start: Any, tmp_path: Path) -> None:
    paths = os.environ.get("PYTHONPATH", "")
    before = ("env", "-i", f"PYTHONPATH={paths}", f"VLLMC_CACHE_DIR={tmp_path / 'cache'}")
    process = start("doctor", before=before)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    assert "cache-empty" in out
