"""What `bench.kernel_scaled --variants` runs beside the matmuls: prefill's configs, torch's product, the GPU's clock.

A `session` is `kernel_session.Session`; a worker logs its rows there.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import kernel_variants


def prefill_worker(session: Any, compile_: Callable[..., Any]) -> None:
    """Configs of the prefill kernel at S = 4096, each first checked over the test table (wide blocks) and there."""
    from bench.kernel_paged_attention import Pool, config_checks, prefill_task

    if session.dry:
        import jax
        import jax.numpy as jnp

        from pallas_kernels.paged_attention import mosaic_prefill_sm90

        pool, S = Pool(4 * 4096), jax.ShapeDtypeStruct

        for config in kernel_variants.prefill_configs():
            fn = functools.partial(mosaic_prefill_sm90.prefill_attention, sm_scale=128**-0.5, config=config)
            pages = S(pool.shape, jnp.bfloat16)
            table, one = S((1, 4096 // 16), jnp.int32), S((1,), jnp.int32)
            compile_(fn, S((1, 4096, 32, 128), jnp.bfloat16), pages, pages, table, one, one)
        session.log(compiled=len(kernel_variants.prefill_configs()))
        return
    pool = Pool(4 * 4096)
    tasks = []
    for config in kernel_variants.prefill_configs():
        tasks += config_checks(config) if config.block_kv != 128 else []
        tasks += [prefill_task(kind, 4096, pool, config=config) for kind in ("full", "causal")]
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        futures = [executor.submit(task.compile) for task in tasks]
        concurrent.futures.wait(futures)
    session.wait_for_others()
    with session.gpu(2):
        for task, future in zip(tasks, futures):
            if session.left < 2:
                session.log(out_of_time="prefill")
                return
            session.doing_now(task.key)
            try:
                row = task.run(future.result())
            except Exception as error:
                row = {"failed": repr(error)[:300]}
            session.log(key=task.key, **row)


def torch_worker(session: Any) -> None:
    """torch._scaled_mm, row-wise, at M = 4096 and 256: in a CUDA graph, on this bench's data."""
    try:
        import torch
    except ImportError:
        session.log(torch="not installed: no baseline of torch in this run")
        return
    if session.dry:
        session.log(torch=torch.__version__)
        return
    from pallas_kernels.scaled_matmul.cases import LLAMA_8B

    session.wait_for_others()
    with session.gpu(1):
        for shape, (n, k) in LLAMA_8B.items():
            for m in (256, 4096):
                session.doing_now(f"torch {shape} {m}")
                row: dict[str, Any] = {"op": "torch._scaled_mm", "shape": shape, "m": m}
                try:
                    row |= time_torch(torch, m, n, k, max(6, math.ceil(300e6 / (n * k))) if m <= 256 else 4)
                except Exception as error:
                    row["failed"] = repr(error)[:300]
                session.log(**row)


def time_torch(torch: Any, m: int, n: int, k: int, calls: int) -> dict[str, Any]:
    def fp8(*shape: int) -> Any:
        return (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)

    x, ws = fp8(m, k), [fp8(n, k) for _ in range(calls)]
    xs, wsc = torch.rand(m, 1, device="cuda") + 0.5, torch.rand(1, n, device="cuda") + 0.5

    def chain_once() -> None:
        for w in ws:
            torch._scaled_mm(x, w.t(), scale_a=xs, scale_b=wsc, out_dtype=torch.bfloat16, use_fast_accum=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            chain_once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain_once()
    graph.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(3):
        begin.record()
        replays = max(2, int(0.02 / (2 * m * n * k * calls / 1.2e15)))
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (replays * calls))
    us = statistics.median(times)
    return {"us": round(us, 2), "TFLOPs": round(2 * m * n * k / us / 1e6)}


def watch_clocks(path: Path, start: float) -> Any:
    """A process that writes clock, power and what limits them every 20 ms, or None without nvidia-smi."""
    query = "clocks.sm,power.draw,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-lms", "20"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        return None

    def copy() -> None:
        with path.open("w") as file:
            for line in process.stdout or ():
                file.write(f"{time.time() - start:.2f}, {line}")

    threading.Thread(target=copy, daemon=True).start()
    return process


def best_variants(rows: list[dict[str, Any]]) -> None:
    """Per shape and M the three fastest by kernel time beside the heuristic's, which is the mean of its runs."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for r in rows:
        if "kernel_us" in r and not r.get("WRONG"):
            groups.setdefault((r.get("op"), r.get("mode") or r.get("kind"), r.get("shape"), r.get("m")), []).append(r)
    for key, found in groups.items():
        base = [r["kernel_us"] for r in found if r.get("heuristic")]
        others = sorted((r for r in found if r.get("heuristic") is False), key=lambda r: r["kernel_us"])[:3]
        if base and others:
            print(*key, "heuristic", round(statistics.mean(base), 2), f"({max(base) - min(base):.2f} between its runs)")
            for r in others:
                print(f"    {r['kernel_us']:9.2f} wall {r['us']:9.2f}  {r.get('config') or r.get('split')}")
