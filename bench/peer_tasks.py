"""The same problems through torch: cuBLAS, Marlin, Machete, CUTLASS, FlashAttention-3, cuDNN, and the JIT peers.

Needs a folder with the script and the extensions of /work/shared/peers (its README tells how to build them):
FOLDER/bench_peer_kernels.py and FOLDER/kernels/. Every peer runs in a process of its own under the GPU lock; its rows
are checked there, timed over rotated weights in CUDA graph replay, and renamed here to the words of our own rows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tasks import Rows, Task

# In order of worth: name prefixes of the script's peers. The last two compile with nvcc, some seconds a config.
PEERS = (
    "machete",
    "marlin_vllm0.25.1:w4a16",
    "cutlass_scaled_mm_vllm0.25.1:fp8_rowwise",
    "cutlass_scaled_mm_vllm0.25.1:w8a8_int8_rowwise",
    "marlin_vllm0.25.1:w8a16",
    "attn",
    "cublaslt_scaled_mm",
    "torch_scaled_mm",
    "torch_int_mm",
    "cublas:bf16",
    "tinygemm",
)
JIT_PEERS = ("deepgemm", "humming_0.1.19:w4a16")
_NAMES = {
    "cutlass_scaled_mm_vllm0.25.1:fp8_rowwise": "cutlass_scaled_mm_fp8_rowwise",
    "cutlass_scaled_mm_vllm0.25.1:w8a8_int8_rowwise": "cutlass_scaled_mm_w8a8_int8_rowwise",
    "marlin_vllm0.25.1:w8a16_g128": "marlin_w8a16",
    "marlin_vllm0.25.1:w4a16_g128": "marlin_w4a16",
    "fa3_vllm0.25.1_paged16:decode_attn_bf16": "fa3_paged16",
}


def python_with_torch() -> str | None:
    """An interpreter that imports torch: this one, or the system's."""
    for candidate in (sys.executable, shutil.which("python3"), "/usr/bin/python3", "/usr/local/bin/python3"):
        if (
            candidate
            and Path(candidate).exists()
            and not subprocess.run([candidate, "-c", "import torch"], capture_output=True).returncode
        ):
            return candidate
    return None


def row_of(line: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> dict[str, Any] | None:
    """A line of the peers' script in our words; None for its notes."""
    if "peer" not in line or not {"us", "error"} & set(line):
        return None
    name = f"{line['peer']}:{line['scheme']}" if "scheme" in line else line["peer"]
    short = _NAMES.get(name, line["peer"].split("_vllm")[0].split("_0.1")[0])
    row: dict[str, Any] = {"op": "peer", "peer": short, "scheme": line.get("scheme")}
    named = {(n, k): shape for shape, (n, k) in shapes.items()}
    if "M" in line:
        row |= {"shape": named.get((line["N"], line["K"])), "n": line["N"], "k": line["K"], "m": line["M"]}
    if "B" in line:
        row |= {"rows": line["B"], "context": line["ctx"]}
    if "error" in line:
        return row | {"failed": line["error"]}
    for theirs, ours in (("us", "us"), ("TFLOPs", "tflops"), ("err", "error"), ("ok", "ok"), ("timing", "timing")):
        if theirs in line:
            row[ours] = line[theirs]
    return row


@dataclasses.dataclass(frozen=True)
class Peers:
    """folder: the script and the packed extensions; parts: where these are unpacked."""

    folder: Path
    parts: Path = dataclasses.field(default_factory=lambda: Path(tempfile.gettempdir()) / "peers")

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "PEERS_DIR": str(self.parts)}

    def unpack(self) -> None:
        """Once on a machine: JIT peers may be reading."""
        done = self.parts / "unpacked"
        if not done.exists():
            script = str(self.folder / "kernels" / "unpack.sh")
            subprocess.run(["bash", script], env=self.env, check=True, capture_output=True)
            self.parts.mkdir(exist_ok=True)
            done.touch()

    def command(self, python: str, peer: str, shapes: dict[str, tuple[int, int]], ms: Sequence[int]) -> list[str]:
        """Of the script, for one peer; more options may follow."""
        found = [python, str(self.folder / "bench_peer_kernels.py"), "--peers", peer, "--parts", str(self.parts)]
        found += ["--ms", ",".join(map(str, ms))]
        return [*found, "--shapes", ",".join(f"{n}x{k}" for n, k in shapes.values())]


def warm_jit_peers(peers: Peers, shapes: dict[str, tuple[int, int]], ms: Sequence[int], seconds: float) -> None:
    """Has the JIT peers compile what will be timed (some seconds of nvcc a config; both keep it in the home folder).
    They launch what they compile, so that nothing may be timed meanwhile."""
    python = python_with_torch()
    if python is None:
        return
    commands = [[*peers.command(python, peer, shapes, ms), "--peer-seconds", str(seconds)] for peer in JIT_PEERS]
    running = [subprocess.Popen(command, env=peers.env, stdout=subprocess.DEVNULL) for command in commands]
    until = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def peer_tasks(
    folder: Path, shapes: dict[str, tuple[int, int]], ms: Sequence[int], rows: Rows, *, seconds: float, jit: bool
) -> list[Task]:
    """One task a peer; a task's rows go to `rows` as they come, its own row counts them."""
    peers = Peers(folder)
    unpacking = threading.Lock()
    found: list[str] = []

    def unpack() -> str:
        with unpacking:  # the tasks' compiling threads all come here; the first one does it
            if not found:
                python = python_with_torch()
                if python is None:
                    raise RuntimeError("no Python with torch found: peers that come through torch are left out")
                peers.unpack()
                found.append(python)
            return found[0]

    def task(peer: str, limit: float) -> Task:
        def run(python: str) -> dict[str, Any]:
            out = Path(tempfile.mkdtemp()) / "rows.jsonl"
            command = [*peers.command(python, peer, shapes, ms), "--out", str(out)]
            command += ["--seconds", str(limit), "--peer-seconds", str(limit)]
            done = subprocess.run(command, capture_output=True, text=True, env=peers.env, timeout=limit + 30)
            lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
            good = [row for line in lines if (row := row_of(line, shapes))]
            for row in good:
                named = " ".join(str(row[key]) for key in ("shape", "m", "rows", "context") if key in row)
                rows.add({"key": f"peer {row['peer']} {named}", **row})
            if done.returncode or not good:
                raise RuntimeError(f"{peer}: no rows (exit {done.returncode}): {done.stderr.strip()[-300:]}")
            return {"op": "peer_run", "peer": peer, "count": len(good)}

        return Task(f"peer {peer}", unpack, run, limit=limit + 40)

    def prefill() -> Task:
        def run(python: str) -> dict[str, Any]:
            command = [python, "-m", "bench.peer_prefill", "--parts", str(peers.parts)]
            root = Path(__file__).parents[1]
            done = subprocess.run(command, capture_output=True, text=True, env=peers.env, timeout=60, cwd=root)
            good = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            for row in good:
                rows.add({"key": f"peer {row['peer']} {row['kind']}", **row})
            if not good:
                raise RuntimeError(f"no rows (exit {done.returncode}): {done.stderr.strip()[-300:]}")
            return {"op": "peer_run", "peer": "prefill", "count": len(good)}

        return Task("peer prefill", unpack, run, limit=80)

    tasks = [task(peer, seconds) for peer in PEERS]
    tasks.insert(2, prefill())
    return tasks + ([task(peer, 60) for peer in JIT_PEERS] if jit else [])
