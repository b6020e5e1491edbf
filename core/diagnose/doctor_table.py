"""Everything that `vllmc doctor` can find, with what it means. Imports no torch.

docs/doctor.md is made from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

Level: TypeAlias = Literal["problem", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of finding: when it is reported (`cause`), why it matters, and what cures it.

    A `problem` makes the cache useless, or vllmc itself; a `warning` may, and a `note` is to be
    known. The three texts are Markdown.
    """

    level: Level
    cause: str
    why: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something found on this machine: `what` and `fix` name its paths, values and commands.

    `fix` is empty where nothing needs to be done.
    """

    id: str
    level: Level
    what: str
    why: str
    fix: str


def found(kind: str, what: str, fix: str) -> Finding:
    """A finding of the kind with this id."""
    why = KINDS[kind].why.replace("`", "")
    return Finding(id=kind, level=KINDS[kind].level, what=what, why=why, fix=fix)


_LOST: Final = "Everything that was compiled is compiled again on the next start."
_COMPILES: Final = "It matters when something must be compiled; a hit for the CPU needs none of it."
_RISK: Final = "What others can write, others can replace, and loading an artifact runs its code."
_REFUSED: Final = f"{_RISK} So it is not used."


KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "cache-in-memory": Kind(
            level="problem",
            cause="The cache is written to a file system in memory (`tmpfs`, `ramfs`), such as "
            "`/dev/shm`.",
            why=f"It is emptied when the machine or the container restarts. {_LOST}",
            cure="Name a directory on a disk or a volume: `export VLLMC_CACHE_DIR=DIR`.",
        ),
        "cache-in-container-layer": Kind(
            level="problem",
            cause="The cache is written to the writable layer of a container (`overlay`): it is "
            "empty, or something was added since the container started.",
            why=f"The layer goes with the container. {_LOST}",
            cure="Mount a volume there (`docker run -v vllmc-cache:DIR`, in Kubernetes a "
            "PersistentVolumeClaim), or warm the cache in a step of the image's build. In such a "
            "step itself it is as it should be.",
        ),
        "cache-in-image": Kind(
            level="note",
            cause="The cache lies on a container's root file system, and all that it holds was "
            "there when the container started.",
            why="What came with the image stays. What this container adds goes with it.",
            cure="Nothing, where all that is served was warmed: `vllmc warm --check MODEL` tells.",
        ),
        "cache-in-container-root": Kind(
            level="warning",
            cause="As `cache-in-container-layer`, where the root file system is no `overlay`.",
            why="Most containers' root file systems go with them, and the cache with it.",
            cure="Mount a volume there, or warm the cache while the image is built.",
        ),
        "cache-in-pod-volume": Kind(
            level="problem",
            cause="The cache is written to an `emptyDir` of Kubernetes.",
            why=f"It goes with the pod, at each rollout and eviction. {_LOST}",
            cure="Use a PersistentVolumeClaim in its place, or bake the cache into the image.",
        ),
        "cache-in-anonymous-volume": Kind(
            level="warning",
            cause="The cache is written to a volume of Docker or Podman that has no name.",
            why="A new container gets a new one, and `--rm` removes it.",
            cure="Give the volume a name: `-v vllmc-cache:DIR`.",
        ),
        "cache-in-temporary-directory": Kind(
            level="warning",
            cause="The cache is written below `/tmp`, `/var/tmp` or `TMPDIR`.",
            why="Such directories are emptied at a restart, or of what was not used for some days.",
            cure="Name another directory, or none: the default is in the user's cache directory.",
        ),
        "cache-on-object-store": Kind(
            level="warning",
            cause="The cache is written to an object store that is mounted as a file system "
            "(`fuse.gcsfuse`, `fuse.s3fs`, ...).",
            why="Most of these cannot rename a file in one step, which is how vllmc publishes what "
            "it stores.",
            cure="Write to a disk; use the object store as a layer that is only read.",
        ),
        "cache-on-network": Kind(
            level="note",
            cause="A directory of the cache lies on a network file system.",
            why="It may be shared by many machines, and is slower. Files are published by "
            "renaming, which holds between hosts; other CPUs have keys of their own.",
            cure="Nothing.",
        ),
        "cache-path-relative": Kind(
            level="warning",
            cause="The directory of the cache was given as a relative path.",
            why="A start from another working directory has another, empty cache.",
            cure="Give the whole path.",
        ),
        "cache-path-unexpanded": Kind(
            level="warning",
            cause="The directory of the cache has a `$` in its name.",
            why="Most likely a variable that nobody expanded: manifests and unit files are no "
            "shells. The cache then lies where nobody expects it.",
            cure="Write the path out, or `$(NAME)` in a manifest of Kubernetes.",
        ),
        "cache-by-default": Kind(
            level="note",
            cause="Nobody named a directory, so the cache lies in the user's cache directory.",
            why="A start as another user, or with another `HOME` or `XDG_CACHE_HOME`, looks "
            "elsewhere.",
            cure="`export VLLMC_CACHE_DIR=DIR` where the cache is warmed and where it is used.",
        ),
        "cache-of-root-by-sudo": Kind(
            level="warning",
            cause="This runs as root, by `sudo`, and the cache lies in root's home.",
            why="A server that runs as another user looks in its own home, or may not read this.",
            cure="Run it as the user that serves, or name a directory with `VLLMC_CACHE_DIR`.",
        ),
        "home-unset": Kind(
            level="warning",
            cause="`HOME` is not set, and nobody named a directory for the cache.",
            why="The home is then that of the password file, which need not be the one that "
            "another start has.",
            cure="`export VLLMC_CACHE_DIR=DIR`.",
        ),
        "cache-not-a-directory": Kind(
            level="problem",
            cause="Where the cache should be is a file, a link to nowhere, or a path below a file.",
            why="Nothing can be read from there or stored there.",
            cure="Remove what is there, or name another directory.",
        ),
        "cache-not-readable": Kind(
            level="problem",
            cause="This user may not enter a directory of the cache, or read files in it: often "
            "it was warmed by root, and a server runs as another user.",
            why="What is out of reach is compiled again at every start.",
            cure="Run as its owner, or let this user read it.",
        ),
        "cache-not-writable": Kind(
            level="problem",
            cause="The cache is empty, and this user cannot write to it: by its permissions, or "
            "because the file system is mounted read-only.",
            why="Nothing can ever be stored, so every start compiles.",
            cure="Let this user write there, name another directory, or mount a cache that was "
            "warmed elsewhere.",
        ),
        "cache-read-only": Kind(
            level="note",
            cause="The cache holds programs, and this user cannot write to it.",
            why="Hits work. What it does not hold is compiled at each start and never stored.",
            cure="Nothing, where all that is served was warmed: `vllmc warm --check MODEL` tells.",
        ),
        "cache-of-another-user": Kind(
            level="problem",
            cause="A directory of the cache belongs neither to this user nor to root, and it is "
            "empty, or holds what no trusted key signed.",
            why=_REFUSED,
            cure="Warm as the user that serves, or hand the files over: `chown -R`.",
        ),
        "cache-writable-by-others": Kind(
            level="problem",
            cause="A directory of the cache can be written by its group or by everyone, and it is "
            "empty, or holds what no trusted key signed.",
            why=_REFUSED,
            cure="`chmod go-w DIR`. Where a volume is given to a group (`fsGroup`), leave that "
            "out, or set `fsGroupChangePolicy: OnRootMismatch` and use a directory of your own "
            "below it.",
        ),
        "cache-files-not-trusted": Kind(
            level="problem",
            cause="Records in the cache belong neither to this user nor to root, or can be written "
            "by their group or by everyone, and no trusted key signed them.",
            why=_REFUSED,
            cure="Warm as the user that serves, or hand the files over: "
            "`chown -R USER DIR && chmod -R go-w DIR`. Or sign it: `vllmc warm --sign-key FILE`, "
            "`vllmc trust add FILE.pub`.",
        ),
        "unsigned-is-used": Kind(
            level="warning",
            cause="Others may have written a directory of the cache, and `--trust-unsigned` or "
            "`VLLMC_TRUST_UNSIGNED` has it used all the same.",
            why=_RISK,
            cure="Sign it (`vllmc warm --sign-key FILE`) and trust the key (`vllmc trust add "
            "FILE.pub`).",
        ),
        "cache-layer-missing": Kind(
            level="warning",
            cause="One of the directories that are only read does not exist.",
            why="An image or a volume that should bring a warmed cache is not there.",
            cure="Correct the path, or mount it.",
        ),
        "cache-empty": Kind(
            level="note",
            cause="No directory of the cache holds a program.",
            why="The next start compiles everything.",
            cure="`vllmc warm MODEL`.",
        ),
        "cache-disk-full": Kind(
            level="problem",
            cause="There is hardly any room left where the cache is written, or hardly an inode.",
            why="Nothing more can be stored.",
            cure="Free some space, or name another directory.",
        ),
        "cache-disk-low": Kind(
            level="warning",
            cause="There is less than 1 GB left where the cache is written, or few inodes.",
            why="It will be full after some more models, and nothing can be stored then.",
            cure="Free some space, or name another directory.",
        ),
        "cache-leftovers": Kind(
            level="note",
            cause="Processes that died left unfinished files in the cache, a day ago or earlier.",
            why="They take room, and nothing reads them. The next write to the cache removes them.",
            cure="Nothing.",
        ),
        "ci-runner": Kind(
            level="note",
            cause="This is a job of CI.",
            why="Its file system goes with it: the next job finds only what was saved.",
            cure="Save and restore the cache's directory with your CI's own cache.",
        ),
        "package-missing": Kind(
            level="problem",
            cause="torch, Triton or Transformers is not installed for this Python.",
            why="Nothing can be compiled or loaded without them.",
            cure="`pip install` it into the environment that vllmc runs in.",
        ),
        "package-outdated": Kind(
            level="problem",
            cause="torch, Triton or Transformers is older than vllmc can use.",
            why="What vllmc needs of it is not there.",
            cure="`pip install --upgrade`.",
        ),
        "torch-newer": Kind(
            level="note",
            cause="torch is newer than the versions that vllmc was tested with.",
            why="It is used as the newest of those is, once a tiny piece that is compiled with it "
            "has given what eager gives.",
            cure="Nothing, where `vllmc warm` works. `vllmc` of a later date may know it: "
            "`pip install --upgrade vllmc`.",
        ),
        "package-mixed": Kind(
            level="problem",
            cause="A package's metadata names another version than its own files do.",
            why="Two installations lie over each other: keys name a version that does not run.",
            cure="`pip install --force-reinstall`.",
        ),
        "torch-does-not-start": Kind(
            level="problem",
            cause="There is a GPU, and asking torch for it failed. torch is asked only then.",
            why="Nothing can be compiled or loaded with a torch that cannot be imported.",
            cure="See what `python -c 'import torch'` says, and install torch again.",
        ),
        "torch-without-gpu": Kind(
            level="warning",
            cause="There is a GPU, and the installed torch is a build for the CPU alone.",
            why="`--device auto` takes the CPU, and so compiles for it: another key, and none that "
            "a start on the GPU would find.",
            cure="Install a build of torch for CUDA.",
        ),
        "gpu-not-usable": Kind(
            level="problem",
            cause="There is a GPU and a torch for it, and torch cannot use it.",
            why="`--device auto` takes the CPU, and compiles nothing that a start on a GPU needs.",
            cure="Most often the driver is older than torch's CUDA asks for, or the container was "
            "started without the GPU (`docker run --gpus all`).",
        ),
        "gpu-not-in-torch": Kind(
            level="problem",
            cause="The installed torch has no kernels for this GPU's compute capability.",
            why="torch's own kernels fail on it.",
            cure="Install a build of torch that has them.",
        ),
        "gpu-hidden": Kind(
            level="note",
            cause="`CUDA_VISIBLE_DEVICES` hides every GPU.",
            why="`--device auto` takes the CPU.",
            cure="`unset CUDA_VISIBLE_DEVICES`, if that is not meant.",
        ),
        "no-gpu": Kind(
            level="note",
            cause="torch is a build for a GPU, and no driver for one was found.",
            why="What is warmed here is for the CPU. A key for a GPU names the GPU.",
            cure="Warm for a GPU on a machine that has one of that kind.",
        ),
        "no-compiler": Kind(
            level="warning",
            cause="There is no C++ compiler (`CXX`, else `g++`), and the cache is empty.",
            why="Inductor needs one for what it compiles for CPUs. A hit for the CPU needs none.",
            cure="Install one (`apt-get install g++`), or bring a cache that was warmed elsewhere.",
        ),
        "no-compiler-for-misses": Kind(
            level="note",
            cause="There is no C++ compiler (`CXX`, else `g++`), and the cache holds programs.",
            why="Hits need none. What is missing cannot be compiled for the CPU.",
            cure="Nothing, where all that is served was warmed: `vllmc warm --check MODEL` tells.",
        ),
        "no-c-compiler": Kind(
            level="warning",
            cause="There is a GPU that torch can use, and no C compiler (`CC`, else `gcc` or "
            "`clang`).",
            why="Triton builds a helper of its driver with one when it is first used, also on a "
            "hit, unless the helper lies in Triton's own cache (`TRITON_CACHE_DIR`, else "
            "`~/.triton/cache`).",
            cure="Install one (`apt-get install gcc`), or keep Triton's cache as well.",
        ),
        "no-python-headers": Kind(
            level="warning",
            cause="There is a compiler and no `Python.h` of this Python.",
            why=f"Inductor's kernels for CPUs include it, and so does Triton's helper. {_COMPILES}",
            cure="Install Python's headers (`apt-get install python3-dev`).",
        ),
        "kernels-cannot-be-loaded": Kind(
            level="problem",
            cause="No code can be mapped from a file in memory: this is not Linux, `/proc` is not "
            "mounted, or a policy of the kernel forbids it.",
            why="Kernels for CPUs are loaded that way, so not even a hit runs.",
            cure="Mount `/proc`, allow `memfd_create` (seccomp, `vm.memfd_noexec`), or use Linux.",
        ),
        "no-temporary-directory": Kind(
            level="warning",
            cause="No directory for temporary files can be written to.",
            why=f"Inductor compiles in one. {_COMPILES}",
            cure="`export TMPDIR=DIR`, or mount something writable at `/tmp`.",
        ),
        "temporary-directory-not-writable": Kind(
            level="warning",
            cause="`TORCHINDUCTOR_CACHE_DIR` cannot be written to.",
            why=f"Inductor compiles there. {_COMPILES}",
            cure="Name another directory, or unset the variable.",
        ),
        "temporary-directory-noexec": Kind(
            level="warning",
            cause="Where Inductor compiles is mounted `noexec`.",
            why=f"Inductor loads from there what it compiled. {_COMPILES} Nor does it matter for "
            "the cache itself: vllmc loads from memory.",
            cure="`export TORCHINDUCTOR_CACHE_DIR=DIR` with a directory that is mounted otherwise.",
        ),
        "temporary-directory-full": Kind(
            level="warning",
            cause="Where Inductor compiles, less than 500 MB are left.",
            why=f"Precompiled headers and kernels need some hundred. {_COMPILES}",
            cure="Free some space, or `export TORCHINDUCTOR_CACHE_DIR=DIR`.",
        ),
        "unknown-variable": Kind(
            level="warning",
            cause="A variable whose name begins with `VLLMC_` is none that vllmc reads.",
            why="What it should set is not set, and so not part of the key.",
            cure="Correct its name; [the command line](cli.md) lists them.",
        ),
        "empty-variable": Kind(
            level="note",
            cause="A variable of vllmc's is set to nothing, and so counts as unset.",
            why="Most likely it was to be filled in from another one.",
            cure="Set or unset it.",
        ),
        "variable-differs-each-start": Kind(
            level="warning",
            cause="A variable that may be part of the key holds an address, this host's name or a "
            "path in a temporary directory.",
            why="Another start has another value, and so another key: it misses.",
            cure="Unset it, or give it a value that stays.",
        ),
        "variables-in-key": Kind(
            level="note",
            cause="Variables that torch's compiler reads are set.",
            why="Most are part of the key: where one of them differs, the start misses.",
            cure="Set them alike where the cache is warmed and where it is used. "
            "`vllmc inspect-key MODEL` shows what each one sets.",
        ),
        "config-by-directory": Kind(
            level="note",
            cause="Options come from a config file that lies in the working directory.",
            why="A start from another directory does not read it, and so may have another key.",
            cure="Name it: `export VLLMC_CONFIG=FILE`.",
        ),
        "hub-offline-empty": Kind(
            level="warning",
            cause="`HF_HUB_OFFLINE` is set, and there is no cache of the hub.",
            why="A MODEL given as `org/name` cannot be found, so not even its key is known.",
            cure="Mount the hub's cache and name it with `HF_HOME`, or give models as directories.",
        ),
    }
)
"""Each kind of finding by its id."""
