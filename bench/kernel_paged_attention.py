"""Paged attention on this GPU: correctness first, then microseconds per call.

    python -m bench.kernel_paged_attention [--only decode,prefill] [--budget SECONDS] [--out DIR] [--sweep]

A call's time is a jitted chain of calls (each takes the previous output as its query, and its own pages of one large
pool, so that keys and values come from HBM) as XLA replays it from a command buffer: wall clock / calls. Beside it the
sum of CUPTI kernel durations. Lines of JSON go to DIR/paged_attention.jsonl as they come.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import mosaic_decode_sm90, mosaic_prefill_sm90, reference
from pallas_kernels.paged_attention.cases import DECODE_CASES, PREFILL_CASES, dense_attention, make
from pallas_kernels.paged_attention.config import DecodeConfig, PrefillConfig, decode_heuristic, prefill_heuristic

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# (rows, context, bar in us): the table.
DECODE = (
    (1, 1024, 8),
    (8, 1024, 18.3),
    (64, 1024, 74),
    (256, 1024, 285),
    (1, 8192, 16),
    (8, 8192, 76.5),
    (64, 8192, 494.6),
    (256, 8192, 1930),
)
DECODE_FP8 = ((64, 8192, 275), (256, 8192, 1100))
POOL_TOKENS = 256 * 8192  # 8.6 GB of bf16 keys and values


class Log:
    def __init__(self, out: str | None, budget: float):
        self.path = Path(out) / "paged_attention.jsonl" if out else None
        self.start, self.budget, self.rows = time.time(), budget, []

    def __call__(self, **row: Any) -> None:
        row["at"] = round(time.time() - self.start, 1)
        self.rows.append(row)
        line = json.dumps(row, default=str)
        print(line, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")

    @property
    def left(self) -> float:
        return self.budget - (time.time() - self.start)


def kernel_times(call: Any) -> float:
    """Sum of kernel durations of one call, us (CUPTI)."""
    from jax._src.lib import mosaic_gpu as lib

    ext = lib._mosaic_gpu_ext
    ext._cupti_init()
    try:
        jax.block_until_ready(call())
    finally:
        timings = ext._cupti_get_timings(True)
    return sum(ms for _, ms in timings) * 1e3


def check_cases(log: Log, kind: str, call: Any, configs: list[Any]) -> bool:
    """Runs the test table on this device against float64 numpy."""
    good = True
    for case in (DECODE_CASES if kind == "decode" else PREFILL_CASES).values():
        data = make(case)
        want = dense_attention(case, data, case.head_dim**-0.5)
        for config in configs:
            try:
                got = np.asarray(call(case, data, config).astype(jnp.float32))
                error = float(np.abs(got - want).max() / np.abs(want).max())
                if not error < 0.02:
                    good = False
                    log(check=kind, case=case.name, config=str(config), error=error, WRONG=True)
                else:
                    log(check=kind, case=case.name, error=round(error, 5), config=str(config))
            except NotImplementedError as e:
                log(check=kind, case=case.name, refused=str(e)[:100])
                break
            except Exception as e:
                good = False
                log(check=kind, case=case.name, config=str(config), failed=repr(e)[:300])
    return good


def run_decode_case(case: Any, data: dict, config: Any) -> jax.Array:
    f = jax.jit(
        functools.partial(
            mosaic_decode_sm90.decode_attention, sm_scale=case.head_dim**-0.5, window=case.window,
            soft_cap=case.soft_cap, config=config,
        )
    )  # fmt: skip
    return f(
        *(jnp.asarray(data[n]) for n in ("q", "k_pages", "v_pages", "page_table", "lens")),
        k_scale=data["k_scale"], v_scale=data["v_scale"],
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_pool(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    bits = jax.random.bits(jax.random.key(seed), shape, jnp.uint8)
    return ((bits.astype(jnp.float32) - 127.5) / 64).astype(dtype)


def tables(rows: int, context: int, page: int, calls: int, pages: int) -> list[np.ndarray]:
    """Page tables of `calls` calls: random pages, disjoint until the pool is used up."""
    rng = np.random.default_rng(0)
    need = rows * context // page
    order = np.concatenate([rng.permutation(np.arange(1, pages)) for _ in range(-(-need * calls // (pages - 1)))])
    return [order[i * need : (i + 1) * need].reshape(rows, context // page).astype(np.int32) for i in range(calls)]


def chain(op: Any, calls: int) -> Any:
    inner = jax.jit(op)

    def run(q, k_pages, v_pages, lens, *page_tables):
        for i in range(calls):
            q = inner(q, k_pages, v_pages, page_tables[i], lens)
        return q

    return jax.jit(run)


def time_chain(fn: Any, args: tuple, calls: int) -> tuple[float, float]:
    """(wall clock, sum of kernel durations) of one call, us. Enough chains are queued that one sync costs < 1 %."""
    for _ in range(3):
        jax.block_until_ready(fn(*args))
    kernel = kernel_times(lambda: fn(*args)) / calls
    chains = int(np.clip(120e3 / (kernel * calls), 2, 400))
    walls = []
    for _ in range(5):
        start = time.perf_counter()
        out = None
        for _ in range(chains):
            out = fn(*args)
        jax.block_until_ready(out)
        walls.append((time.perf_counter() - start) / (chains * calls) * 1e6)
    return statistics.median(walls), kernel


def candidates(rows: int, context: int, row_bytes: int, sweep: bool) -> list[Any]:
    best = decode_heuristic(rows * KV_HEADS, context, row_bytes, 132)
    if not sweep:
        return [best]
    C = DecodeConfig
    if row_bytes == 128:
        more = [C(4, 6, 1), C(4, 4, 1), C(4, 8, 1), C(8, 6, 1), C(4, 6, 2), C(4, 12, 1), C(4, 6, 4)]
    elif rows == 1:
        more = [C(8, 3, 8), C(4, 6, 8), C(4, 3, 8), C(8, 2, 8), C(8, 3, 4), C(8, 3, 8, True), C(8, 3, 16)]
    elif rows == 8:
        more = [C(4, 3, 4), C(8, 3, 2), C(4, 6, 2), C(4, 3, 2), C(4, 3, 8), C(8, 3, 1)]
    else:
        more = [
            C(4, 3, 1),
            C(4, 2, 1),
            C(4, 6, 1),
            C(8, 3, 1),
            C(4, 3, 2),
            C(4, 4, 1),
            C(4, 3, 4),
            C(4, 3, 1, True),
            C(8, 2, 2),
        ]
    return list(dict.fromkeys([best, *more]))


def bench_decode(log: Log, sweep: bool, page: int = 16) -> None:
    pages = POOL_TOKENS // page
    shape = (pages, KV_HEADS, page, HEAD_DIM)
    scale = HEAD_DIM**-0.5
    pool: dict[str, Any] = {"dtype": None}

    def use(dtype: Any) -> None:
        if pool["dtype"] != dtype:
            pool.clear()
            pool.update(dtype=dtype, kv=tuple(jax.block_until_ready(random_pool(shape, dtype, s)) for s in (1, 2)))

    jobs: list[Any] = []
    for dtype, table in ((jnp.bfloat16, DECODE), (jnp.float8_e4m3fn, DECODE_FP8)):
        for rows, context, bar in table:
            calls = 32 if rows * context <= 8192 else (16 if rows * context <= 2**19 else 3)
            row_bytes = HEAD_DIM * jnp.dtype(dtype).itemsize
            for config in candidates(rows, context, row_bytes, sweep):
                jobs.append((dtype, rows, context, bar, calls, config))

    def build(job: Any) -> Any:
        dtype, rows, context, _, calls, config = job
        kwargs: dict[str, Any] = dict(sm_scale=scale, config=config)
        if dtype != jnp.bfloat16:
            kwargs |= dict(k_scale=0.5, v_scale=0.5)
        op = functools.partial(mosaic_decode_sm90.decode_attention, **kwargs)
        S = jax.ShapeDtypeStruct
        pages_of = [S((rows, context // page), jnp.int32)] * calls
        args = (
            S((rows, HEADS, HEAD_DIM), jnp.bfloat16),
            S(shape, dtype),
            S(shape, dtype),
            S((rows,), jnp.int32),
            *pages_of,
        )
        return chain(op, calls).lower(*args).compile()

    with concurrent.futures.ThreadPoolExecutor(12) as executor:
        built = [(job, executor.submit(build, job)) for job in jobs]
        checked: dict[Any, Any] = {}
        for job, future in built:
            dtype, rows, context, bar, calls, config = job
            if log.left < 5:
                future.cancel()
                continue
            name = f"decode {jnp.dtype(dtype).name} {rows}x{context}"
            try:
                fn = future.result()
                use(dtype)
                rng = np.random.default_rng(1)
                q = jnp.asarray(rng.standard_normal((rows, HEADS, HEAD_DIM)), jnp.bfloat16)
                lens = jnp.full((rows,), context, jnp.int32)
                page_tables = [jnp.asarray(t) for t in tables(rows, context, page, calls, pages)]
                if (dtype, rows, context) not in checked:  # the first call's first rows against the XLA reference
                    few = min(rows, 2)
                    scales = {} if dtype == jnp.bfloat16 else dict(k_scale=0.5, v_scale=0.5)
                    f = functools.partial(mosaic_decode_sm90.decode_attention, sm_scale=scale, **scales)
                    g = functools.partial(reference.decode_attention, sm_scale=scale, **scales)
                    args = (q[:few], *pool["kv"], page_tables[0][:few], lens[:few])
                    x, y = (np.asarray(jax.jit(h)(*args), np.float32) for h in (f, g))
                    checked[dtype, rows, context] = float(np.abs(x - y).max() / np.abs(y).max())
                wall, kernel = time_chain(fn, (q, *pool["kv"], lens, *page_tables), calls)
                moved = 2 * rows * context * KV_HEADS * HEAD_DIM * jnp.dtype(dtype).itemsize
                log(
                    op=name, config=str(config), us=round(wall, 2), kernel_us=round(kernel, 2), bar=bar,
                    GBs=round(moved / wall / 1e3), error=round(checked[dtype, rows, context], 5),
                )  # fmt: skip
            except Exception as e:
                log(op=name, config=str(config), failed=repr(e)[:300])


def run_prefill_case(case: Any, data: dict, config: Any) -> jax.Array:
    f = jax.jit(
        functools.partial(
            mosaic_prefill_sm90.prefill_attention, sm_scale=case.head_dim**-0.5, window=case.window,
            soft_cap=case.soft_cap, config=config,
        )
    )  # fmt: skip
    lens = jnp.asarray(data["lens"])
    return f(
        *(jnp.asarray(data[n]) for n in ("q", "k_pages", "v_pages", "page_table")), lens[:, 0], lens[:, 1],
        k_scale=data["k_scale"], v_scale=data["v_scale"],
    )  # fmt: skip


def bench_prefill(log: Log, sweep: bool, page: int = 16) -> None:
    """4,096 queries in 32 tiles of 128: "causal" as one chunk of one sequence; "full" with every tile at the end of
    the same 4,096 keys (only its diagonal block is masked). TFLOP/s count the visible keys only."""
    context, tq, calls = 4096, 128, 8
    tiles, pages = context // tq, 4 * context // page
    scale = HEAD_DIM**-0.5
    C = PrefillConfig
    configs: list[Any] = [prefill_heuristic(HEAD_DIM)]
    if sweep:
        configs += [C(128, 2, True), C(128, 2, False), C(64, 4, False), C(64, 4, True), C(128, 3, False)]
        configs = list(dict.fromkeys(configs))
    shape = (pages, KV_HEADS, page, HEAD_DIM)

    def build(config: Any) -> Any:
        inner = jax.jit(functools.partial(mosaic_prefill_sm90.prefill_attention, sm_scale=scale, config=config))

        def run(q, k_pages, v_pages, table, start, length):
            for _ in range(calls):
                q = inner(q, k_pages, v_pages, table, start, length)
            return q

        S = jax.ShapeDtypeStruct
        ints = [S((tiles, context // page), jnp.int32), S((tiles,), jnp.int32), S((tiles,), jnp.int32)]
        args = (S((tiles, tq, HEADS, HEAD_DIM), jnp.bfloat16), S(shape, jnp.bfloat16), S(shape, jnp.bfloat16), *ints)
        return jax.jit(run).lower(*args).compile(), jax.jit(inner).lower(*args).compile()

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        built = [(config, executor.submit(build, config)) for config in configs]
        rng = np.random.default_rng(0)
        kv = [random_pool(shape, jnp.bfloat16, s) for s in (1, 2)]
        table = np.broadcast_to(rng.permutation(np.arange(1, pages))[: context // page], (tiles, context // page))
        table = jnp.asarray(table.astype(np.int32))
        q = jnp.asarray(rng.standard_normal((tiles, tq, HEADS, HEAD_DIM)), jnp.bfloat16)
        length = jnp.full((tiles,), tq, jnp.int32)
        for name, start in (("causal", np.arange(tiles) * tq), ("full", np.full(tiles, context - tq))):
            start = start.astype(np.int32)
            visible = float(sum((s + 1) * tq + tq * (tq - 1) / 2 for s in start))
            flops = 4 * visible * HEADS * HEAD_DIM
            few = np.array([0, 13, tiles - 1])
            ref = jax.jit(functools.partial(reference.prefill_attention, sm_scale=scale))
            want = np.asarray(ref(q[few], *kv, table[few], jnp.asarray(start[few]), length[few]), np.float32)
            for config, future in built:
                if log.left < 3:
                    continue
                try:
                    fn, single = future.result()
                    args = (q, *kv, table, jnp.asarray(start), length)
                    got = np.asarray(single(*args)[few], np.float32)
                    error = float(np.abs(got - want).max() / np.abs(want).max())
                    wall, kernel = time_chain(fn, args, calls)
                    log(
                        op=f"prefill {name} {context}", config=str(config), us=round(wall, 1),
                        kernel_us=round(kernel, 1), TFLOPs=round(flops / wall / 1e6),
                        kernel_TFLOPs=round(flops / kernel / 1e6), error=round(error, 5),
                    )  # fmt: skip
                except Exception as e:
                    log(op=f"prefill {name}", config=str(config), failed=repr(e)[:300])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="decode,prefill")
    parser.add_argument("--budget", type=float, default=100)
    parser.add_argument("--out")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--page", type=int, default=16)
    args = parser.parse_args()
    log = Log(args.out, args.budget)
    log(device=jax.devices()[0].device_kind, jax=jax.__version__)
    if "decode" in args.only:
        configs = [DecodeConfig(4, 3, 1), DecodeConfig(8, 3, 8)] if args.sweep else [DecodeConfig(4, 3, 2)]
        check_cases(log, "decode", run_decode_case, configs)
        bench_decode(log, args.sweep, args.page)
    if "prefill" in args.only:
        check_cases(log, "prefill", run_prefill_case, [None, PrefillConfig(64, 2, True)])
        bench_prefill(log, args.sweep, args.page)


if __name__ == "__main__":
    main()
