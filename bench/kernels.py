"""The kernels' acceptance table, from one call: every op at its model shapes, with its bar, its bound and its peers.

    python -m bench.kernels [--budget SECONDS] [--groups w4a16,...] [--shapes 8b|70b] [--ms 1,16,64,256,4096]
                            [--peers DIR] [--jit-peers] [--out DIR] [--name kernels]

Each group (an op, or a kind of peer) is a process of its own: all compile beside each other, while a lock lets one at a
time use the GPU, the most important first. A process that hangs is killed, its row marked, and the rest of its rows run
in a new one. Rows go to OUT/NAME.jsonl as they come; OUT/NAME.json (see record.py) has them with the bandwidth measured
in the same run, each row's bound by it, and the sums that the bars are for. `--quick`: tiny shapes, to run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.bars import MATMUL_BARS, OF_W4A16, QUANTIZE_LARGE_SHARE, QUANTIZE_SMALL_US, SHAPES
from bench.peer_tasks import Peers, warm_jit_peers
from bench.tasks import DEVICE_LOST
from bench.timing import GpuLock

GROUPS = (
    "hbm",
    "prefill",
    *MATMUL_BARS,
    "decode",
    "quantize",
    "peers",
    "prefill_other",
    "quantize_other",
    "xla_fp8",
    "xla_int8",
    "xla_bf16",
    *OF_W4A16,
)
# Asked for by name only: other configs than the ops' own, and what 4 bits cost with smaller groups, zero points, ...
OTHER = {"prefill_other", "quantize_other", *OF_W4A16}
ATTENTION = {"prefill": "prefill_tasks", "decode": "decode_tasks", "prefill_other": "prefill_alternatives"}
MS = (1, 16, 64, 256, 4096)
QUANTIZE_MS = (1, 16, 64, 4096, 32768)
RESTARTS = 4
# Products that share an operand must stay apart, or XLA would merge a chain's calls into one.
XLA_FLAGS = "--xla_gpu_dot_merger_threshold_mb=0"
# Attention's XLA oracle is compiled beside others' timing: it must not try out its products on the GPU.
ORACLE_FLAGS = "--xla_gpu_autotune_level=0"


# --- one group, in its own process ---


def run_group(args: argparse.Namespace) -> None:
    from bench.tasks import Rows, Task, run_tasks
    from bench.timing import hbm_bytes_per_second

    group, quick = args.group, args.quick
    shapes = SHAPES["tiny" if quick else args.shapes]
    ms = [int(m) for m in args.ms.split(",")]
    rows = Rows(Path(args.rows) if args.rows else None, echo=False)
    lock = GpuLock(Path(args.lock) if args.lock else None, GROUPS.index(group))
    if group == "hbm":
        measure = lambda _: {"op": "hbm", "bytes_per_second": hbm_bytes_per_second(0.001 if quick else 2)}  # noqa: E731
        tasks = [Task("hbm", lambda: None, measure)]
    elif group in ATTENTION:
        from bench import kernel_paged_attention as attention

        tasks = getattr(attention, ATTENTION[group])(quick=quick)
    elif group == "quantize":
        from bench.quantize_tasks import quantize_tasks

        tasks = quantize_tasks((1, 16), 256, 384) if quick else quantize_tasks(QUANTIZE_MS)
    elif group == "quantize_other":
        from bench.quantize_tasks import quantize_alternatives

        tasks = quantize_alternatives(() if quick else QUANTIZE_MS)
    elif group == "peers":
        from bench.peer_tasks import peer_tasks

        tasks = peer_tasks(Path(args.peers), shapes, ms, rows, seconds=args.peer_seconds, jit=args.jit_peers)
    else:
        from bench.matmul_tasks import matmul_tasks

        tasks = matmul_tasks(group, shapes, ms)
    skip = frozenset(json.loads(args.skip))
    run_tasks(tasks, rows, lock, deadline=args.deadline, threads=args.threads, skip=skip)


# --- the parent ---


class Group:
    """The process of one group and what it has written so far."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, deadline: float):
        self.name, self.args, self.folder, self.deadline = name, args, folder, deadline
        self.path = folder / f"{name}.jsonl"
        self.hung: list[dict[str, Any]] = []
        self.restarts = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        args = self.args
        nice = str(min(19, 2 * GROUPS.index(self.name)))  # the more important compile first
        command = [
            "nice",
            "-n",
            nice,
            sys.executable,
            "-m",
            "bench.kernels",
            "--group",
            self.name,
            "--rows",
            str(self.path),
        ]
        command += ["--lock", str(self.folder), "--deadline", str(self.deadline), "--ms", args.ms]
        command += ["--shapes", args.shapes, "--peers", args.peers, "--peer-seconds", str(args.peer_seconds)]
        command += ["--skip", json.dumps([row["key"] for row in self.rows()]), "--threads", str(args.threads)]
        command += ["--jit-peers"] * args.jit_peers + ["--quick"] * args.quick
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        flags = XLA_FLAGS if self.name.startswith("xla") else ORACLE_FLAGS if self.name in ATTENTION else ""
        if flags and not args.quick:
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags}".strip()
        log = (self.folder / f"{self.name}.log").open("ab")
        try:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)
        finally:
            log.close()

    def rows(self) -> list[dict[str, Any]]:
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        return [{"group": self.name, **json.loads(line)} for line in whole.splitlines()] + self.hung

    def tend(self, held: dict[str, Any] | None) -> bool:
        """Kills a hung process, restarts a dead one; True while it runs."""
        code = self.process.poll()
        if code is None:
            over = held is not None and held["pid"] == self.process.pid and time.time() - held["since"] > held["limit"]
            if not over and time.time() < self.deadline + 15:
                return True
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if code == 0 or time.time() >= self.deadline:
            return False
        if code == DEVICE_LOST and self.restarts < RESTARTS:  # its row says which kernel it was
            self.restarts += 1
            self.process = self._start()
            return True
        if held is None or held["pid"] != self.process.pid or self.restarts == RESTARTS:
            tail = (self.folder / f"{self.name}.log").read_text(errors="replace")[-400:]
            self.hung.append({"group": self.name, "key": f"{self.name} process", "failed": f"exit {code}: {tail}"})
            return False
        reason = "hung; killed" if code is None else f"the process died with {code}"
        self.hung.append({"group": self.name, "key": held["what"], "failed": reason})
        (self.folder / "held.json").unlink(missing_ok=True)
        self.restarts += 1
        self.process = self._start()
        return True


def _held(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "held.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the groups until they are done or the budget is; returns all rows."""
    deadline = time.time() + args.budget - 8
    folder = Path(tempfile.mkdtemp(prefix="bench-kernels-"))
    out = Path(args.out) / f"{args.name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    names, written = args.groups.split(","), 0
    groups: list[Group] = []
    try:
        if args.jit_peers and "peers" in names:
            peers, ms = Peers(Path(args.peers)), [int(m) for m in args.ms.split(",")]
            peers.unpack()
            with GpuLock(folder).hold("jit peers", limit=args.budget):  # the groups compile meanwhile
                groups += [Group(name, args, folder, deadline) for name in names]
                warm_jit_peers(peers, SHAPES["tiny" if args.quick else args.shapes], ms, args.budget / 3)
        else:
            groups += [Group(name, args, folder, deadline) for name in names]
        while True:
            held = _held(folder)
            alive = [group.tend(held) for group in groups]
            for stale in folder.glob("want-*"):
                if not Path(f"/proc/{stale.name.rsplit('-', 1)[1]}").exists():
                    stale.unlink(missing_ok=True)
            rows = [row for group in groups for row in group.rows()]
            if len(rows) > written:
                out.write_text("".join(json.dumps(row) + "\n" for row in rows))
                written = len(rows)
            if not any(alive):
                return rows
            time.sleep(0.2)
    finally:
        for group in groups:
            if group.process.poll() is None:
                group.process.kill()


def finish(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds each row's bound (bytes at the bandwidth of this run) and returns what stands beside the rows."""
    hbm = next((row["bytes_per_second"] for row in rows if row.get("op") == "hbm" and "bytes_per_second" in row), None)
    for row in rows:
        if hbm and "bytes" in row:
            row["bound_us"] = round(row["bytes"] / hbm * 1e6, 2)
        if row.get("group") in ("quantize", "quantize_other") and "us" in row and "bound_us" in row:
            small = row["m"] <= 64
            row["bar_us"] = QUANTIZE_SMALL_US if small else round(row["bound_us"] / QUANTIZE_LARGE_SHARE, 2)
    return {"hbm_bytes_per_second": hbm, "sums": sums(rows)}


def sums(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Microseconds over the shapes of one layer, where all of them were measured and right, beside the bar."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("shape") and "us" in row and row.get("ok", True):
            found.setdefault((row.get("peer") or row["op"], row["m"]), {})[row["shape"]] = row
    out = []
    for (op, m), by_shape in sorted(found.items(), key=lambda item: (item[0][0], item[0][1])):
        if any(set(by_shape) == set(shapes) for shapes in SHAPES.values()):
            total: dict[str, Any] = {"op": op, "m": m, "us": round(sum(r["us"] for r in by_shape.values()), 1)}
            for key in ("kernel_us", "bound_us"):
                if all(r.get(key) is not None for r in by_shape.values()):
                    total[key] = round(sum(r[key] for r in by_shape.values()), 1)
            if set(by_shape) == set(SHAPES["8b"]) and m in MATMUL_BARS.get(op, {}):
                total["bar_us"] = MATMUL_BARS[op][m]
            out.append(total)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds for all")
    parser.add_argument("--groups", default=",".join(g for g in GROUPS if g not in OTHER))
    parser.add_argument("--shapes", default="8b", choices=sorted(SHAPES))
    parser.add_argument("--ms", default=",".join(map(str, MS)))
    parser.add_argument("--peers", default=str(Path(__file__).parent.parent / ".carry" / "peers"))
    parser.add_argument("--peer-seconds", type=float, default=20, help="for each peer")
    parser.add_argument("--jit-peers", action="store_true", help="DeepGEMM and Humming too: a minute more")
    parser.add_argument("--threads", type=int, default=3, help="compiling threads of each group")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--name", default="kernels", help="of the result file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to run without a GPU")
    for hidden in ("--group", "--rows", "--lock"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="[]", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=time.time() + 3600, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        run_group(args)
        return
    unknown = set(args.groups.split(",")) - set(GROUPS)
    if unknown:
        parser.error(f"unknown groups {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    if not (Path(args.peers) / "bench_peer_kernels.py").exists():
        print(f"no peers in {args.peers}: only XLA's own are measured beside", file=sys.stderr)
        args.groups = ",".join(g for g in args.groups.split(",") if g != "peers")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = run_all(args)
    more = finish(rows)
    from bench.record import write

    for row in rows:
        for end in ("failed", "skipped"):
            if end in row:
                print(f"{end.upper()} {row['key']}: {row[end]}")
    for total in more["sums"]:
        print(json.dumps(total))
    print(write(args.name, rows, args.out, **more))


if __name__ == "__main__":
    main()
