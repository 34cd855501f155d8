"""racecheck's reports taken apart, and those of them that are known to be false, with the reason."""

from __future__ import annotations

import dataclasses
import re

_ACCESS = re.compile(r"(?:Race reported between|and) (Read|Write) access at (\S+?)\+0x[0-9a-f]+ in (\S+?):\d+")


@dataclasses.dataclass(frozen=True)
class Access:
    kind: str  # "Read" or "Write"
    function: str
    file: str


@dataclasses.dataclass(frozen=True)
class Report:
    """One access and those that it races with, and the sanitizer's lines about them."""

    first: Access
    others: tuple[Access, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Known:
    """A false report. It must be this tool's, in this group, and have these kinds of accesses in this file only."""

    name: str
    groups: tuple[str, ...]
    file: str
    first: str
    others: str
    reason: str

    def explains(self, group: str, report: Report) -> bool:
        here = {access.file for access in (report.first, *report.others)} == {self.file}
        kinds = report.first.kind == self.first and {access.kind for access in report.others} == {self.others}
        return here and kinds and group in self.groups


KNOWN = (
    Known(
        "decode sums",
        ("w4a16", "w8a16"),
        "decode_sm90.py",
        "Write",
        "Read",
        "A warp's partial sums: 32 lanes store them, bar.warp.sync, lane 0 arrives at the mbarrier that the readers "
        "wait for. bar.warp.sync orders the stores before the arrival, and the arrival releases them. ptxas knows "
        "that the warp has converged and makes a NOP of it (STS, STS, NOP, @lane0 SYNCS.ARRIVE; a warp's accesses "
        "to shared memory run in order), so that racecheck sees lane 0 arrive for itself and reports the other "
        "lanes: of the 8 that hold x row 0, 7, with 4 bytes each in 16 blocks, are the 448 hazards of each store "
        "and load at M = 1, N = 256. Threads store nothing else in this kernel's shared memory, so that no other "
        "write can hide behind this, and test_a16.py holds the barrier in its place.",
    ),
)


def reports(text: str) -> list[Report]:
    """The races in racecheck's output; a report that cannot be read is not among them."""
    found = []
    for block in re.split(r"=+\s*(?=(?:Error|Warning): Race reported)", text)[1:]:
        lines = [line for line in block.splitlines() if " access at " in line]
        accesses = [_ACCESS.search(line) for line in lines]
        known = [Access(*match.groups()) for match in accesses if match]
        if len(known) == len(lines) > 1:
            found.append(Report(known[0], tuple(known[1:]), "\n".join(lines)))
    return found


def explain(group: str, text: str) -> dict[str, int]:
    """How many of the output's races each known false report explains."""
    counts: dict[str, int] = {}
    for report in reports(text):
        for known in KNOWN:
            if known.explains(group, report):
                counts[known.name] = counts.get(known.name, 0) + 1
                break
    return counts
