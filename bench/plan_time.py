"""How long `jqserve plan` takes, from the command to its exit: a fixture, and an 8B model's headers.

    python -m bench.plan_time [--runs 20] [--out DIR]

Each run is a process of its own, one after the other; its seconds are those of a clock on the wall and of the
processor (user and system). The machine's load when it began stands in the result: on a busy one the two differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import record
from bench.header_checkpoint import write_headers
from bench.llama8b import QUICK

DEMO = Path(__file__).parent.parent / "jqserve" / "demo" / "model"


def commands(folder: Path, quick: bool) -> dict[str, list[str]]:
    """Name -> what is run behind `python -m`. The 8B shapes are 4 shards of headers without data."""
    changes = QUICK if quick else {}
    cases = {"demo": ["jqserve.cli.main", "plan", str(DEMO)]}
    for scheme in ("bf16", "gptq"):
        tensors = write_headers(folder / scheme, scheme, **changes)
        cases[f"8B shape, {scheme}, {tensors} tensors"] = ["jqserve.cli.main", "plan", str(folder / scheme)]
    cases["8B shape, bf16, --quantization awq"] = [*cases[list(cases)[1]], "--quantization", "awq"]
    return cases | {"jqserve --help": ["jqserve.cli.main", "--help"], "server --help": ["jqserve.cli.server", "--help"]}


def once(words: list[str]) -> tuple[float, float]:
    """(seconds by the clock, seconds of the processor) of one process."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} exited with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime


def measure(runs: int, quick: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name, words in commands(Path(folder), quick).items():
            once(words)  # compiles the modules' byte code, and fills the page cache
            wall, cpu = zip(*(once(words) for _ in range(runs)))
            row = {"case": name, "runs": runs}
            for what, values in (("wall", wall), ("cpu", cpu)):
                row |= {f"{what}_seconds": round(statistics.median(values), 3)}
                row |= {f"{what}_least": round(min(values), 3), f"{what}_most": round(max(values), 3)}
            print(row, flush=True)
            rows.append(row)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each command")
    parser.add_argument("--out", help="a folder for plan_time.json; default: bench/results")
    parser.add_argument(
        "--quick", action="store_true", help="a small model instead of the 8B shape, to check the script"
    )
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows = measure(args.runs, args.quick)
    print(record.write("plan_time", rows, args.out, load_average=round(load, 2)))


if __name__ == "__main__":
    main()
