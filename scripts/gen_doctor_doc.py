"""Writes docs/doctor.md from the table of findings; `--check` only says if it is up to date."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pages import publish

from vllmc.core.diagnose.doctor import LEVELS
from vllmc.core.diagnose.doctor_table import KINDS, Kind

PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"

HEAD = """# vllmc doctor

<!-- Written by scripts/gen_doctor_doc.py: change core/diagnose/doctor_table.py, then run it. -->

`vllmc doctor` looks at this machine as the next `vllmc warm` or `vllmc run` will find it, and says
what would make the cache useless, and what to do about it. Run it where the model is served, as
the user that serves it, with the same variables and in the same working directory.

It compiles nothing and changes nothing. It imports no torch: versions are read from the packages'
files, and only where there is a GPU's driver and a torch for it, torch is asked in a process of its
own, which takes some seconds. A torch for the CPU that cannot be imported is therefore not noticed.

| level | meaning | exit code |
|---|---|---|
| problem | the cache, or vllmc itself, is of no use like this | 3 |
| warning | it may be, for some starts or models | 0 |
| note | to be known | 0 |

In a script, `vllmc doctor -q > /dev/null || exit 1`; for more, `--json` has the ids below under
`findings`, and all that was looked at under `facts`.

What is no finding: a cache on a file system that is mounted `noexec` (kernels are loaded from
memory), an empty Inductor or Triton cache (artifacts are self-contained), a small `/dev/shm` (vllmc
does not use it).

"""


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(line for level in LEVELS for line in _section(level))


def _section(level: str) -> Iterator[str]:
    yield f"## {level.capitalize()}s\n"
    for name, kind in KINDS.items():
        if kind.level == level:
            yield _entry(name, kind)


def _entry(name: str, kind: Kind) -> str:
    lines = (kind.cause, kind.why, f"**Fix:** {kind.cure}")
    body = "\n\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in lines)
    return f"### `{name}`\n\n{body}\n"


if __name__ == "__main__":
    sys.exit(publish(PAGE, page(), "scripts/gen_doctor_doc.py"))
