"""The sanitizer's script: its cases run (without the sanitizer), its summaries are read."""

from __future__ import annotations

import json
import sys

import pytest

from bench import sanitize


@pytest.mark.parametrize("group", sanitize.GROUPS)
def test_cases_run(group, capsys):
    sanitize.run_group(group, few=True)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["ok"], row


def test_summaries():
    assert sanitize.findings("========= ERROR SUMMARY: 0 errors") == 0
    assert sanitize.findings("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)") == 3
    assert sanitize.findings("Segmentation fault") == -1


# What an H200 said of w4a16 at M = 1, N = 256, K = 512, shortened.
REPORT = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at body_mosaic_gpu_kernel+0x1120 in decode_sm90.py:55
=========     and Read access at body_mosaic_gpu_kernel+0x12a0 in decode_sm90.py:55 [448 hazards]
=========     and Read access at body_mosaic_gpu_kernel+0x12b0 in decode_sm90.py:55 [448 hazards]
========= 
========= Error: Race reported between Write access at body_mosaic_gpu_kernel+0x1140 in decode_sm90.py:55
=========     and Read access at body_mosaic_gpu_kernel+0x12a0 in decode_sm90.py:55 [448 hazards]
========= 
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"""  # noqa: W291


def test_known_races_pass():
    row = sanitize.judge("racecheck", "w4a16", REPORT)
    assert row == {"findings": 2, "known": {"decode sums": 2}}


@pytest.mark.parametrize(
    ("group", "old", "new"),
    [
        ("quantize", "", ""),  # another kernel's group
        ("w4a16", "+0x12b0 in decode_sm90.py", "+0x12b0 in wgmma_sm90.py"),  # one access elsewhere
        ("w4a16", "and Read access at body_mosaic_gpu_kernel+0x12b0", "and Write access at body_mosaic_gpu_kernel+0x1"),
        ("w4a16", "between Write access at body_mosaic_gpu_kernel+0x1140", "between Read access at kernel+0x1140"),
        ("w4a16", "SUMMARY: 2 hazards", "SUMMARY: 3 hazards"),  # one was not printed
        ("w4a16", "in decode_sm90.py:55 [448", "in ? [448"),  # cannot be read
        ("w4a16", REPORT[REPORT.index("========= RACECHECK") :], ""),  # the sanitizer died
    ],
)
def test_other_races_fail(group, old, new):
    row = sanitize.judge("racecheck", group, REPORT.replace(old, new) if old else REPORT)
    assert "report" in row and row["findings"] != sum(row.get("known", {}).values())


@pytest.mark.parametrize(
    ("group", "clean"),
    [
        ('echo \'{"case": "a", "ok": true}\'', True),
        ('echo \'{"case": "a", "ok": false}\'', False),
        ('echo \'{"case": "a", "failed": "no memory"}\'', False),
        ("echo ImportError >&2; false", False),  # no case ran, so the sanitizer saw nothing wrong
        ('echo \'{"case": "a", "ok": true}\'; sleep 30', False),  # the next case hangs
    ],
)
def test_only_groups_that_came_to_their_end_are_clean(group, clean, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{group}\necho '========= ERROR SUMMARY: 0 errors'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "sanitizer", lambda: str(tool))
    each = "2" if "sleep" in group else "60"
    options = ["--tools", "memcheck", "--groups", "decode", "--each", each, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sanitize", *options])
    with pytest.raises(SystemExit) as done:
        sanitize.main()
    assert done.value.code == (0 if clean else 1)
    (row,) = json.loads((tmp_path / "sanitize.json").read_text())["rows"]
    assert ("ImportError" in row.get("failed", "")) == ("ImportError" in group)
    assert [case["case"] for case in row["cases"]] == ["a"] * ("ImportError" not in group)
    assert ("not done" in row.get("failed", "")) == ("sleep" in group)
