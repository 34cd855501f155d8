"""compute-sanitizer over small cases of every op: stray accesses (memcheck) and races in shared memory (racecheck).

    python -m bench.sanitize [--tools memcheck,racecheck] [--groups w4a16,...] [--budget SECONDS] [--each SECONDS]
                             [--out DIR]

Each (tool, group) is a process of its own under the sanitizer, which only instruments this package's kernels. Buffers
are allocated one by one (XLA's pool would hide an access past the end of one) and command buffers are off. Every result
is also compared with its reference. Writes DIR/sanitize.json; exits 1 where the sanitizer found something that
bench/race_reports.py does not know to be false, where a result is wrong, and where a group did not come to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import race_reports

MATMULS = ("w4a16", "w8a16", "fp8_row", "fp8_block", "int8_row")
GROUPS = (*MATMULS, "quantize", "decode", "prefill", "sample")
MATMUL_CASES = ((1, 256, 512), (16, 384, 512), (64, 256, 1024), (130, 256, 512))  # M, N, K
SAMPLE_CASES = (("peaked", 5001, 0.6, 0, 0.9), ("plateau", 5001, 1.0, 2000, 0.9), ("normal", 4096, 2.0, 0, 0.95))
ATTENTION_CASES = {
    "decode": ("llama8b", "page64", "mqa", "window", "fp8"),
    "prefill": ("chunks", "window", "fp8", "head256"),
}


def run_group(group: str, few: bool) -> None:
    """Runs the group's cases once each in this process; a JSON line for each."""

    def add(name: str, call: Any, limit: float) -> None:
        try:
            error = call()
            row = {"case": name, "error": round(error, 5), "ok": error < limit}
        except Exception as problem:
            row = {"case": name, "failed": repr(problem)[:300]}
        print(json.dumps(row), flush=True)  # one by one: a case that hangs is the one behind these

    if group in ATTENTION_CASES:
        from bench.kernel_paged_attention import check_task

        for name in ATTENTION_CASES[group][: 1 if few else None]:

            def check(name: str = name) -> float:
                task = check_task(group, name)
                return task.run(task.compile())["error"]

            add(name, check, 0.02)
    elif group == "sample":
        from bench.sampling import once as draw
        from pallas_kernels.sample.cases import Case

        for asked in SAMPLE_CASES[: 1 if few else None]:
            add("{} of {}".format(*asked), lambda asked=asked: draw(Case(*asked)), 1)
    elif group == "quantize":
        from bench.quantize_tasks import once

        for name, m, k, block in (("residual_rms_norm", 5, 1024, None), ("silu_mul", 3, 384, 128))[
            : 1 if few else None
        ]:
            add(f"{name} {m}x{k}", lambda a=(name, m, k, block): once(*a), 0.04)
    else:
        from bench.matmul_tasks import once as multiply

        for case in MATMUL_CASES[: 1 if few else None]:
            add("x".join(map(str, case)), lambda case=case: multiply(group, *case), 0.02)


def sanitizer() -> str | None:
    """compute-sanitizer on PATH, in the CUDA toolkit, or in a wheel."""
    found = shutil.which("compute-sanitizer")
    places = [Path(found)] if found else []
    places += sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    places += [p for folder in sys.path for p in Path(folder).glob("nvidia/*/bin/compute-sanitizer")]
    return str(places[0]) if places else None


def findings(text: str) -> int:
    """The number in the sanitizer's last summary line; -1 without one (it died)."""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return int(counts[-1]) if counts else -1


def judge(tool: str, group: str, text: str) -> dict[str, Any]:
    """What the sanitizer said of a group: how many findings, which of them are known, and the text about the others."""
    row: dict[str, Any] = {"findings": findings(text)}
    known = race_reports.explain(group, text) if tool == "racecheck" else {}
    if known:
        row["known"] = known
    if row["findings"] != sum(known.values()):
        row["report"] = "\n".join(line for line in text.splitlines() if "=====" in line)[:3000]
    return row


def heard(command: list[str], env: dict[str, str], seconds: float) -> tuple[str, str | None]:
    """(stdout and stderr, how it ended if not by itself with status 0), of a process and what it started."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return said, f"not done after {seconds:.0f} s"
    return said, f"exit status {process.returncode}" if process.returncode else None


def is_clean(row: dict[str, Any]) -> bool:
    """Whether a group's cases all ran, were right, and nothing unknown was reported of them."""
    return (
        "report" not in row
        and "failed" not in row
        and bool(row.get("cases"))
        and all(case.get("ok") for case in row["cases"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--budget", type=float, default=280, help="seconds")
    parser.add_argument("--each", type=float, default=45, help="seconds that a group may take under one tool")
    parser.add_argument("--out", help="folder of the result file (default bench/results)")
    parser.add_argument("--few", action="store_true", help="one case of each group")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.groups.split(",")) - set(GROUPS):
        parser.error(f"unknown groups {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    if args.one:
        return run_group(args.one, args.few)
    tool = sanitizer()
    if tool is None:
        sys.exit(
            "compute-sanitizer not found: on PATH, in /usr/local/cuda*/bin, or as a wheel (nvidia-cuda-sanitizer-api)"
        )
    deadline = time.time() + args.budget
    env = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=",
    }
    rows: list[dict[str, Any]] = []
    for name in args.tools.split(","):
        for group in args.groups.split(","):
            left = min(args.each, deadline - time.time())
            row: dict[str, Any] = {"tool": name, "group": group}
            if left < min(10, args.each):
                rows.append(row | {"skipped": "out of time"})
                continue
            command = [tool, "--tool", name, "--kernel-name", "kernel_substring=mosaic_gpu"]
            command += ["--print-limit", "1000"]  # the summary counts what was printed
            command += [sys.executable, "-m", "bench.sanitize", "--one", group] + ["--few"] * args.few
            said, ended = heard(command, env, left)
            row |= judge(name, group, said)
            row["cases"] = [json.loads(line) for line in said.splitlines() if line.startswith('{"case"')]
            if ended or not row["cases"]:
                row["failed"] = f"{ended or 'no case ran'}: {said[-600:]}"
            rows.append(row)
            print(json.dumps(row), flush=True)
    from bench.record import write

    print(write("sanitize", rows, args.out))
    for known in race_reports.KNOWN:
        if any(known.name in row.get("known", ()) for row in rows):
            print(f"known to be false: {known.name}. {known.reason}")
    sys.exit(0 if all(is_clean(row) for row in rows) else 1)


if __name__ == "__main__":
    main()
