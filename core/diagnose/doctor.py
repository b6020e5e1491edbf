"""What on this machine would make the cache useless on the next start. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from vllmc.core.diagnose import doctor_cache, doctor_setup
from vllmc.core.diagnose.doctor_facts import Facts
from vllmc.core.diagnose.doctor_table import Finding, Level

LEVELS: Final[tuple[Level, ...]] = ("problem", "warning", "note")
"""The gravest first."""

CHECKS: Final[tuple[Callable[[Facts], Iterable[Finding]], ...]] = (
    doctor_setup.check_packages,
    doctor_setup.check_device,
    doctor_setup.check_loading,
    doctor_cache.check_place,
    doctor_cache.check_access,
    doctor_cache.check_trust,
    doctor_cache.check_room,
    doctor_cache.check_name,
    doctor_cache.check_user,
    doctor_cache.check_network,
    doctor_cache.check_contents,
    doctor_cache.check_ci,
    doctor_setup.check_variables,
    doctor_setup.check_config,
    doctor_setup.check_compiler,
    doctor_setup.check_temporary,
    doctor_setup.check_hub,
)


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Everything that the checks find, the gravest first."""
    findings = [finding for check in CHECKS for finding in check(facts)]
    return tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))
