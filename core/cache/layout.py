"""Where each thing lies below a cache directory. Imports no torch.

v1/blobs/ab/<sha256>               an artifact
v1/units/ab/<key>.json             the record of a compile unit
v1/programs/ab/<key>/<id>.json     the records of a program, one per version of its sources
v1/codes/ab/<code digest>          which artifact holds this generated code
v1/used/<key>                      the uses of a program, and who holds it (`usage`)
v1/locks/<name>.lock               the lease of who compiles this program or unit
v1/imports/<bundle>.json           where programs came from that were not compiled here
v1/facts/<name>                    answers that were slow to find (`facts`)
v1/tmp/                            files on their way to one of the above
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from vllmc.core.cache.files import reading

Section: TypeAlias = Literal[
    "blobs", "units", "programs", "codes", "used", "locks", "imports", "facts", "tmp", "foreign"
]

_FORMS: tuple[tuple[Section, re.Pattern[str]], ...] = (
    ("blobs", re.compile(r"blobs/([0-9a-f]{2})/(?P<key>\1[0-9a-f]{62})")),
    ("units", re.compile(r"units/([0-9a-f]{2})/(?P<key>\1[0-9a-f]{62})\.json")),
    (
        "programs",
        re.compile(r"programs/([0-9a-f]{2})/(?P<key>\1[0-9a-f]{62})/(?P<id>[0-9a-f]{64})\.json"),
    ),
    ("codes", re.compile(r"codes/([0-9a-f]{2})/(?P<key>\1[0-9a-f]{62})")),
    ("used", re.compile(r"used/(?P<key>[0-9a-f]{64})")),
    ("locks", re.compile(r"locks/(?P<key>[\w.-]+)\.lock")),
    ("imports", re.compile(r"imports/(?P<key>[0-9a-f]{64})\.json")),
    ("facts", re.compile(r"facts/(?P<key>[\w.-]+)")),
    ("tmp", re.compile(r"tmp/(?P<key>[\w.-]+)")),
)
_DIRECTORY = re.compile(
    r"used|locks|imports|facts|tmp|(blobs|units|programs|codes)(/[0-9a-f]{2})?"
    r"|programs/([0-9a-f]{2})/\3[0-9a-f]{62}"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\w.-]+")


def section_of(relative: str) -> tuple[Section, str, str]:
    """The section of a path below `v1/`, the key, digest or name in it, and a program record's id.

    What has no section's form is `foreign`, without a key.
    """
    for section, form in _FORMS:
        if match := form.fullmatch(relative):
            groups = match.groupdict()
            return section, groups["key"], groups.get("id", "")
    return "foreign", "", ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A file of the cache: its section, the key, digest or name it stands for, and where it is.

    `id` is a program record's, and empty for everything else. A file in no section's form is
    `foreign`, with an empty key.
    """

    section: Section
    key: str
    id: str
    path: Path


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths below the cache directory `root`."""

    root: Path

    @property
    def top(self) -> Path:
        """The directory of this layout's version; everything that vllmc writes is below it."""
        return self.root / "v1"

    @property
    def temporary(self) -> Path:
        """The directory of files that are not whole yet."""
        return self.top / "tmp"

    def blob(self, digest: str) -> Path:
        """The path of the artifact with this SHA-256."""
        return self._fanned("blobs", digest)

    def unit(self, key: str) -> Path:
        """The path of the record of a compile unit."""
        return self._fanned("units", key).with_suffix(".json")

    def programs(self, key: str) -> Path:
        """The directory of the records of a program."""
        return self._fanned("programs", key)

    def program(self, key: str, record_id: str) -> Path:
        """The path of one of the records of a program."""
        assert _DIGEST.fullmatch(record_id), record_id
        return self.programs(key) / f"{record_id}.json"

    def code(self, code: str) -> Path:
        """The path of the note that says which artifact holds this generated code."""
        return self._fanned("codes", code)

    def used(self, key: str) -> Path:
        """The path of the file in which the uses of a program are noted."""
        assert _DIGEST.fullmatch(key), key
        return self.top / "used" / key

    def imported(self, bundle: str) -> Path:
        """The path of the note of an imported bundle."""
        assert _DIGEST.fullmatch(bundle), bundle
        return self.top / "imports" / f"{bundle}.json"

    def fact(self, name: str) -> Path:
        """The path of the fact of this name."""
        assert _NAME.fullmatch(name), name
        return self.top / "facts" / name

    def lock(self, name: str) -> Path:
        """The path of the lock of this name."""
        assert _NAME.fullmatch(name), name
        return self.top / "locks" / f"{name}.lock"

    def relative(self, path: Path) -> str:
        """`path` as problems and plans name it: relative to the cache directory, with `/`."""
        return path.relative_to(self.root).as_posix()

    def is_directory_name(self, path: Path) -> bool:
        """Whether `path` is where a directory of the cache lies."""
        return _DIRECTORY.fullmatch(path.relative_to(self.top).as_posix()) is not None

    def walk(self, below: str = "") -> Iterator[Found]:
        """Every file below `v1/<below>`, in the order of names; nothing where there is none.

        Raises `VllmcError` (`bad-cache-dir`, `not-readable`).
        """
        yield from self._walk(self.top / below)

    def _walk(self, directory: Path) -> Iterator[Found]:
        try:
            with reading(directory), os.scandir(directory) as scan:
                children = sorted((item.name, item.is_dir(follow_symlinks=False)) for item in scan)
        except FileNotFoundError:
            return
        for name, is_directory in children:
            found = self.classify(directory / name)
            if is_directory and found.section == "foreign":
                yield from self._walk(found.path)
            else:
                yield found

    def classify(self, path: Path) -> Found:
        """What the file at `path` is, which need not be there."""
        section, key, record_id = section_of(path.relative_to(self.top).as_posix())
        return Found(section=section, key=key, id=record_id, path=path)

    def _fanned(self, section: Section, digest: str) -> Path:
        assert _DIGEST.fullmatch(digest), digest
        return self.top / section / digest[:2] / digest
