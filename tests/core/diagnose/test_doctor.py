from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from examined import DISK, PATH, PLENTY, STARTED, device, layer, machine, place

from vllmc.core.diagnose.doctor import LEVELS, examine
from vllmc.core.diagnose.doctor_facts import Compiler, Facts, Gpu, Hub, Mount, Package, User
from vllmc.core.diagnose.doctor_setup import runs_on
from vllmc.core.diagnose.doctor_table import KINDS

OVERLAY = Mount(point="/", root="/", kind="overlay", options=("rw",))
H100 = Gpu(name="NVIDIA H100", capability="9.0")
EMPTY = {"programs": 0, "newest": None}
POD = "/var/lib/kubelet/pods/1f0c/volumes/kubernetes.io~empty-dir/cache"
NO_COMPILER = Compiler(program=None, version=None, c_program=None, python_headers=True)
SEEN = device(
    toolkit="CUDA 13.0",
    driver="580.1",
    gpus=(H100,),
    torch_sees_gpu=True,
    architectures=("sm_80", "sm_90"),
)


def on(mount: Mount | None, *, container: str = "", **layers: Any) -> Facts:
    """A machine whose cache lies on this mount."""
    return machine(layers=(layer(at=place(mount=mount), **layers),), container=container)


def with_place(**changes: Any) -> Facts:
    return machine(layers=(layer(at=place(**changes)),))


def doubted(*, untrusted: int = 3, unsigned: bool = False, **changes: Any) -> Facts:
    """A machine whose cache holds records that another may have written."""
    layers = (layer(at=place(**changes), untrusted=untrusted),)
    return machine(layers=layers, trust_unsigned=unsigned)


def with_layer(**changes: Any) -> Facts:
    return machine(layers=(layer(**changes),))


def with_below(**changes: Any) -> Facts:
    """A machine with a second directory, which is only read."""
    below = layer(at=place("/opt/cache", **changes), given="/opt/cache", role="read", **EMPTY)
    return machine(layers=(layer(), below))


def with_package(version: str | None, file_version: str | None) -> Facts:
    package = Package(name="torch", oldest="2.11", version=version, file_version=file_version)
    return machine(packages=(package,))


def with_variables(**variables: str) -> Facts:
    return machine(variables=variables)


def mount(kind: str, **changes: Any) -> Mount:
    return replace(DISK, kind=kind, **changes)


ROOTED = mount("ext4", point="/")
VOLUME = mount("ext4", root=f"/var/lib/docker/volumes/{'0a' * 32}/_data")
NAMED = mount("ext4", root="/var/lib/docker/volumes/vllmc-cache/_data")
ROOT_HOME = layer(at=place("/root/.cache/vllmc", owner=0), given="", origin="default")
ROOT = User(uid=0, name="root", home="/root", sudo_user="")
ADA = machine().user

CASES: list[tuple[str, Facts, set[str]]] = [
    ("tmpfs", on(mount("tmpfs")), {"cache-in-memory"}),
    ("a-pod's-volume", on(mount("ext4", root=POD)), {"cache-in-pod-volume"}),
    ("anonymous-volume", on(VOLUME, container="Docker"), {"cache-in-anonymous-volume"}),
    ("named-volume", on(NAMED, container="Docker"), set()),
    ("below-tmp", with_place(resolved="/tmp/cache"), {"cache-in-temporary-directory"}),
    (
        "below-TMPDIR",
        machine(layers=(layer(at=place(resolved="/scratch/c")),), temporary_files="/scratch"),
        {"cache-in-temporary-directory"},
    ),
    ("baked", on(OVERLAY, container="Docker"), {"cache-in-image"}),
    (
        "added-to-an-image",
        on(OVERLAY, container="Docker", newest=STARTED + 5),
        {"cache-in-container-layer"},
    ),
    ("overlay-unmarked", on(OVERLAY, **EMPTY), {"cache-in-container-layer", "cache-empty"}),
    (
        "container's-root",
        on(ROOTED, container="Podman", **EMPTY),
        {"cache-in-container-root", "cache-empty"},
    ),
    ("root-of-a-machine", on(ROOTED), set()),
    ("volume-in-a-container", on(DISK, container="Docker"), set()),
    ("no-proc", on(None), set()),
    ("nfs", on(mount("nfs4")), {"cache-on-network"}),
    ("bucket", on(mount("fuse.gcsfuse")), {"cache-on-object-store"}),
    ("relative", with_layer(given="cache"), {"cache-path-relative"}),
    ("tilde", with_layer(given="~/cache"), set()),
    ("unexpanded", with_layer(given="$HOME/cache"), {"cache-path-unexpanded"}),
    ("default", with_layer(given="", origin="default"), {"cache-by-default"}),
    (
        "no-home",
        machine(layers=(layer(given="", origin="default"),), user=replace(ADA, home=None)),
        {"home-unset"},
    ),
    ("no-home-no-matter", machine(user=replace(ADA, home=None)), set()),
    (
        "sudo",
        machine(layers=(ROOT_HOME,), user=replace(ROOT, sudo_user="ada")),
        {"cache-of-root-by-sudo"},
    ),
    ("sudo-no-matter", machine(user=replace(ADA, sudo_user="eve")), set()),
    (
        "sudo-to-the-server",
        machine(layers=(layer(given="", origin="default"),), user=replace(ADA, sudo_user="eve")),
        {"cache-by-default"},
    ),
    (
        "a-file",
        machine(
            layers=(layer(at=place(state="not-a-directory", readable=False), **EMPTY),),
        ),
        {"cache-not-a-directory"},
    ),
    ("unlistable", with_place(readable=False), {"cache-not-readable"}),
    (
        "unreachable",
        with_place(state="unreachable", reason="Permission denied", owner=None, mode=None),
        {"cache-not-readable"},
    ),
    (
        "read-only-and-empty",
        machine(layers=(layer(at=place(writable=False), **EMPTY),)),
        {"cache-not-writable", "cache-empty"},
    ),
    ("read-only", with_place(writable=False), {"cache-read-only"}),
    (
        "read-only-over-a-baked-one",
        machine(layers=(layer(at=place(writable=False), **EMPTY), layer(role="read"))),
        {"cache-read-only"},
    ),
    (
        "read-only-is-not-full",
        with_place(writable=False, space=replace(PLENTY, free_bytes=0, free_inodes=0)),
        {"cache-read-only"},
    ),
    ("another's", doubted(owner=1001), {"cache-of-another-user"}),
    ("another's-signed", doubted(owner=1001, untrusted=0), set()),
    ("another's-unsigned", doubted(owner=1001, unsigned=True), {"unsigned-is-used"}),
    (
        "another's-empty",
        machine(layers=(layer(at=place(owner=1001), **EMPTY),)),
        {"cache-of-another-user", "cache-empty"},
    ),
    ("root's", with_place(owner=0), set()),
    (
        "a-user's-for-root",
        replace(doubted(), user=ROOT),
        {"cache-of-another-user"},
    ),
    ("for-the-group", doubted(mode=0o2770), {"cache-writable-by-others"}),
    ("for-all", doubted(mode=0o1777), {"cache-writable-by-others"}),
    ("readable-by-all", with_place(mode=0o755), set()),
    ("files-for-all", doubted(), {"cache-files-not-trusted"}),
    ("files-for-all-unsigned", doubted(unsigned=True), {"unsigned-is-used"}),
    ("unsigned-no-matter", doubted(untrusted=0, unsigned=True), set()),
    ("files-of-root-alone", with_layer(unreadable=1), {"cache-not-readable"}),
    ("closed-below", with_layer(unreadable=1, **EMPTY), {"cache-not-readable"}),
    ("below-for-all", with_below(mode=0o777), {"cache-writable-by-others"}),
    (
        "below-missing",
        with_below(state="missing", owner=None, mode=None, readable=False, writable=False),
        {"cache-layer-missing"},
    ),
    ("below-in-an-image", with_below(mount=OVERLAY, writable=False), set()),
    ("empty", with_layer(**EMPTY), {"cache-empty"}),
    ("leftovers", with_layer(leftovers=2, leftover_bytes=30), {"cache-leftovers"}),
    ("full", with_place(space=replace(PLENTY, free_bytes=10**6)), {"cache-disk-full"}),
    ("no-inodes", with_place(space=replace(PLENTY, free_inodes=3)), {"cache-disk-full"}),
    ("low", with_place(space=replace(PLENTY, free_bytes=10**8)), {"cache-disk-low"}),
    (
        "inodes-without-number",
        with_place(space=replace(PLENTY, free_inodes=0, total_inodes=0)),
        set(),
    ),
    ("unknown-room", with_place(space=None), set()),
    ("ci", machine(ci="GitLab CI"), {"ci-runner"}),
    ("no-torch", with_package(None, None), {"package-missing"}),
    ("old-torch", with_package("2.9.1", "2.9.1+cu128"), {"package-outdated"}),
    ("newest-torch", with_package("2.15.3", "2.15.3+cu132"), set()),
    ("newer-torch", with_package("2.16.0", "2.16.0+cu140"), {"torch-newer"}),
    ("next-torch", with_package("3.0.0a0", "3.0.0a0"), {"torch-newer"}),
    ("oldest-torch", with_package("2.11.0", "2.11.0+cu130"), set()),
    ("two-torches", with_package("2.12.0", "2.13.0+cpu"), {"package-mixed"}),
    ("two-builds", with_package("2.13.0+cpu", "2.13.0+cu130"), {"package-mixed"}),
    ("metadata-alone", with_package("2.13.0", None), {"package-mixed"}),
    ("files-alone", with_package(None, "2.13.0"), {"package-mixed"}),
    ("gpu", machine(device=SEEN), set()),
    (
        "broken-torch",
        machine(device=replace(SEEN, torch_sees_gpu=None, torch_failure="ImportError: libcudnn")),
        {"torch-does-not-start"},
    ),
    ("old-driver", machine(device=replace(SEEN, torch_sees_gpu=False)), {"gpu-not-usable"}),
    (
        "torch-for-cpu",
        machine(device=device(driver="580.1", gpus=(H100,))),
        {"torch-without-gpu"},
    ),
    (
        "new-gpu",
        machine(device=replace(SEEN, gpus=(Gpu(name="Next", capability="13.0"),))),
        {"gpu-not-in-torch"},
    ),
    ("hidden", machine(device=device(toolkit="CUDA 13.0", hidden=True)), {"gpu-hidden"}),
    ("no-gpu", machine(device=device(toolkit="CUDA 13.0")), {"no-gpu"}),
    (
        "no-compiler",
        machine(compiler=NO_COMPILER, layers=(layer(**EMPTY),)),
        {"no-compiler", "cache-empty"},
    ),
    ("no-compiler-and-warm", machine(compiler=NO_COMPILER), {"no-compiler-for-misses"}),
    (
        "no-c-compiler",
        machine(compiler=NO_COMPILER, device=SEEN),
        {"no-compiler-for-misses", "no-c-compiler"},
    ),
    (
        "no-headers",
        machine(compiler=replace(machine().compiler, python_headers=False)),
        {"no-python-headers"},
    ),
    ("no-memory-files", machine(memory_files=False), {"kernels-cannot-be-loaded"}),
    (
        "nowhere-to-compile",
        machine(temporary=None, temporary_files=None),
        {"no-temporary-directory"},
    ),
    (
        "inductor's-not-writable",
        machine(temporary=place("/inductor", writable=False)),
        {"temporary-directory-not-writable"},
    ),
    (
        "noexec",
        machine(temporary=place("/tmp", mount=replace(DISK, options=("noexec", "rw")))),
        {"temporary-directory-noexec"},
    ),
    (
        "cache-noexec-is-fine",
        with_place(mount=replace(DISK, options=("noexec", "rw"))),
        set(),
    ),
    (
        "no-room-to-compile",
        machine(temporary=place("/tmp", space=replace(PLENTY, free_bytes=10**8))),
        {"temporary-directory-full"},
    ),
    (
        "misspelt",
        machine(unknown_variables={"VLLMC_CACHEDIR": "VLLMC_CACHE_DIR", "VLLMC_X": ""}),
        {"unknown-variable"},
    ),
    ("cleared", machine(empty_variables=("VLLMC_CACHE_DIR",)), {"empty-variable"}),
    ("set", with_variables(TORCHINDUCTOR_MAX_AUTOTUNE="1"), {"variables-in-key"}),
    (
        "address",
        with_variables(TORCHINDUCTOR_X="tcp://10.0.3.17:80"),
        {"variables-in-key", "variable-differs-each-start"},
    ),
    (
        "host",
        with_variables(TORCHINDUCTOR_X="of-pod-7d9f"),
        {"variables-in-key", "variable-differs-each-start"},
    ),
    (
        "scratch",
        with_variables(TRITON_PTXAS_PATH="/tmp/x1/ptxas"),
        {"variables-in-key", "variable-differs-each-start"},
    ),
    ("version", with_variables(TORCHINDUCTOR_X="1.2.3"), {"variables-in-key"}),
    (
        "config-found",
        machine(config_file="/srv/vllmc.toml"),
        {"config-by-directory"},
    ),
    ("config-named", machine(config_file="/srv/vllmc.toml", config_named=True), set()),
    (
        "offline",
        machine(hub=Hub(path="/hub", exists=False, offline=True)),
        {"hub-offline-empty"},
    ),
    ("online", machine(hub=Hub(path="/hub", exists=False, offline=False)), set()),
]  # fmt: skip


def test_a_healthy_machine_has_no_findings() -> None:
    assert examine(machine()) == ()


@pytest.mark.parametrize(("facts", "ids"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_each_state_of_a_machine_gives_just_its_findings(facts: Facts, ids: set[str]) -> None:
    assert {finding.id for finding in examine(facts)} == ids


def test_every_kind_of_finding_is_met_by_a_case() -> None:
    assert set(KINDS) == {finding.id for _, facts, _ in CASES for finding in examine(facts)}


def test_the_gravest_findings_come_first() -> None:
    facts = machine(ci="Jenkins", memory_files=False, unknown_variables={"VLLMC_X": ""})
    assert [finding.level for finding in examine(facts)] == list(LEVELS)


@pytest.mark.parametrize("facts", [c[1] for c in CASES], ids=[c[0] for c in CASES])
def test_every_problem_and_warning_has_a_fix(facts: Facts) -> None:
    for finding in examine(facts):
        assert finding.fix or finding.level == "note"
        assert "`" not in finding.what + finding.why + finding.fix
        assert not finding.what.endswith(".")


def fix_of(facts: Facts, kind: str) -> str:
    [finding] = [finding for finding in examine(facts) if finding.id == kind]
    return finding.fix


def test_another_directory_is_to_be_named_where_this_one_was() -> None:
    def elsewhere(origin: str) -> str:
        facts = machine(layers=(layer(at=place(mount=mount("tmpfs")), origin=origin),))
        return fix_of(facts, "cache-in-memory").partition(",")[0]

    assert elsewhere("flag") == "--cache-dir DIR"
    assert elsewhere("env:VLLMC_CACHE_DIR") == "export VLLMC_CACHE_DIR=DIR"
    assert elsewhere("default") == "export VLLMC_CACHE_DIR=DIR"
    assert elsewhere("file:vllmc.toml:3") == 'cache-dir = "DIR" in vllmc.toml:3'


@pytest.mark.parametrize(
    ("origin", "fix"),
    [
        ("flag", "--cache-dir {} --cache-dir '/my data'"),
        ("env:VLLMC_CACHE_DIR", "export VLLMC_CACHE_DIR={}:'/my data'"),
        ("file:vllmc.toml:3", 'cache-dir = ["{}", "/my data"] in vllmc.toml:3'),
    ],
)
def test_the_layers_beside_a_directory_stay_where_it_is_named_anew(origin: str, fix: str) -> None:
    first = layer(at=place(mount=mount("tmpfs")), origin=origin)
    below = layer(at=place("/my data"), given="data", origin=origin, role="read")
    facts = machine(layers=(first, below))
    assert fix_of(facts, "cache-in-memory").partition(", with DIR")[0] == fix.format("DIR")
    assert fix_of(facts, "cache-path-relative") == fix.format(PATH)


def test_running_as_the_owner_cures_a_closed_directory_and_no_broken_path() -> None:
    for reason, cure in (("Permission denied", "run it as"), ("File name too long", "export ")):
        facts = with_place(state="unreachable", reason=reason, owner=None, mode=None)
        assert fix_of(facts, "cache-not-readable").startswith(cure)


def test_the_fix_of_a_containers_layer_is_that_of_its_kind() -> None:
    for kind, program in (("Docker", "docker run -v "), ("Podman", "podman run -v ")):
        fix = fix_of(on(OVERLAY, container=kind, **EMPTY), "cache-in-container-layer")
        assert fix.startswith(f"{program}vllmc-cache:{PATH} ")
    fix = fix_of(on(OVERLAY, container="Kubernetes", **EMPTY), "cache-in-container-layer")
    assert fix.startswith(f"mount a PersistentVolumeClaim at {PATH}")


def test_paths_in_commands_are_quoted_for_a_shell() -> None:
    facts = machine(layers=(layer(at=place("/my data", mode=0o777), untrusted=1),))
    assert fix_of(facts, "cache-writable-by-others") == "chmod go-w '/my data'"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("9.0", ("sm_80", "sm_90"), True),
        ("9.0", ("sm_90a",), True),
        ("8.9", ("sm_80",), True),
        ("8.0", ("sm_89",), False),
        ("9.0", ("sm_80",), False),
        ("12.0", ("sm_90", "compute_90"), True),
        ("7.5", ("compute_80",), False),
        ("12.1", ("sm_120",), True),
        ("9.4", ("gfx942",), True),
        ("9.0", (), True),
    ],
)
def test_code_runs_on_later_minors_and_what_is_compiled_late_on_any_later_gpu(
    capability: str, architectures: tuple[str, ...], runs: bool
) -> None:
    assert runs_on(Gpu(name="GPU", capability=capability), architectures) is runs
