from __future__ import annotations

import pytest
import soaking


@pytest.mark.parametrize(
    ("processes", "seconds"),
    [(4, 5), pytest.param(16, 600, marks=pytest.mark.thorough)],
)
def test_processes_that_use_one_cache_at_once(tmp_path, counted, processes, seconds):
    soaked = soaking.soak(tmp_path / "cache", processes, seconds)
    assert soaked.bad() == {}
    assert soaked.problems == ()
    for what in (
        "warm: compiled",
        "read: hit",
        "read: miss",
        "verify: sound",
        "prune: pruned",
        "killed",
    ):
        assert soaked.counts[what] > 0
    for what, count in sorted(soaked.counts.items()):
        counted(f"{processes} processes, {seconds} s: {what}", count)
