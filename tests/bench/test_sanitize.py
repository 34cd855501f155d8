"""The sanitizer's script: its cases run (without the sanitizer), its summaries are read."""

from __future__ import annotations

import pytest

from bench import sanitize


@pytest.mark.parametrize("group", sanitize.GROUPS)
def test_cases_run(group):
    (row,) = sanitize.run_group(group, few=True)
    assert row["ok"], row


def test_summaries():
    assert sanitize.findings("========= ERROR SUMMARY: 0 errors") == 0
    assert sanitize.findings("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)") == 3
    assert sanitize.findings("Segmentation fault") == -1
