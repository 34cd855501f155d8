"""Paged attention on this GPU: prefill and decode, each result against the XLA reference before it is timed.

    python -m bench.kernel_paged_attention [--only prefill,decode] [--budget SECONDS] [--out DIR]
                                           [--sweep] [--check] [--other]

`--check` also runs the test table (every head dim, window, soft cap, fp8) against float64 numpy, after the first rows.
`--other` only times prefill's OTHER_CONFIGS beside the op's own choice, twice, and then checks them over that table.
Writes DIR/paged_attention.json (see record.py) and, as they come, lines of DIR/paged_attention.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.bars import DECODE_BARS, PREFILL_BARS
from bench.tasks import Rows, Task, run_tasks
from bench.timing import GpuLock, chain, time_chain
from pallas_kernels.paged_attention import decode_attention, prefill_attention, reference
from pallas_kernels.paged_attention.cases import DECODE_CASES, PREFILL_CASES, Case, dense_attention, make
from pallas_kernels.paged_attention.config import (
    DecodeConfig,
    PrefillConfig,
    decode_search_space,
    prefill_search_space,
)

KV_HEADS, GROUP, HEAD_DIM, PAGE = 8, 4, 128, 16  # Llama-3.1-8B: 32 query heads
OTHER_CONFIGS = (
    PrefillConfig(split_last=True),
    PrefillConfig(early_keys=True),
    PrefillConfig(early_keys=True, split_last=True),
)
ERROR_LIMIT = 0.02  # of the largest output: weights are rounded to 16 bits, sums of 8,192 of them


@dataclasses.dataclass(frozen=True)
class Pool:
    """Pages of random keys and values, made on the device when first asked for; one dtype at a time."""

    tokens: int
    page: int = PAGE
    kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM

    @property
    def pages(self) -> int:
        return self.tokens // self.page

    @property
    def heads(self) -> int:
        return GROUP * self.kv_heads

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pages, self.kv_heads, self.page, self.head_dim

    def arrays(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return _random_pages(self.shape, jnp.dtype(dtype).name)

    def abstract(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, dtype)


@functools.lru_cache(maxsize=1)
def _random_pages(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    @jax.jit
    def random(seed: int) -> jax.Array:
        bits = jax.random.bits(jax.random.key(seed), shape, jnp.uint8)
        return ((bits.astype(jnp.float32) - 127.5) / 64).astype(dtype)

    return jax.block_until_ready(random(1)), jax.block_until_ready(random(2))


def page_tables(rows: int, context: int, pool: Pool, calls: int) -> list[np.ndarray]:
    """Page tables of `calls` calls: random pages, disjoint until the pool is used up."""
    rng = np.random.default_rng(0)
    need = rows * context // pool.page
    order = np.concatenate(
        [rng.permutation(np.arange(1, pool.pages)) for _ in range(-(-need * calls // (pool.pages - 1)))]
    )
    return [order[i * need : (i + 1) * need].reshape(rows, -1).astype(np.int32) for i in range(calls)]


def _relative(got: jax.Array, want: jax.Array) -> float:
    a, b = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.abs(a - b).max() / np.abs(b).max())


def decode_task(
    rows: int, context: int, dtype: Any, pool: Pool, *, bar: float | None, config: DecodeConfig | None = None
) -> Task:
    """Decode of `rows` sequences of `context` tokens; each call's query is the last one's result."""
    calls = 2 if rows * context < 1024 else 32 if rows * context <= 8192 else 16 if rows * context <= 2**19 else 3
    name = f"decode {jnp.dtype(dtype).name} {rows}x{context}" + (f" {config}" if config else "")
    scales: dict[str, Any] = {} if jnp.dtype(dtype).itemsize == 2 else dict(k_scale=0.5, v_scale=0.5)
    options: dict[str, Any] = dict(sm_scale=pool.head_dim**-0.5, **scales)

    def op(q: Any, k_pages: Any, v_pages: Any, lens: Any, table: Any) -> jax.Array:
        if config is None:
            return decode_attention(q, k_pages, v_pages, table, lens, **options)
        from pallas_kernels.paged_attention import mosaic_decode_sm90

        return mosaic_decode_sm90.decode_attention(q, k_pages, v_pages, table, lens, config=config, **options)

    def compile() -> Any:
        S = jax.ShapeDtypeStruct
        fixed = (S((rows, pool.heads, pool.head_dim), jnp.bfloat16), *[pool.abstract(dtype)] * 2, S((rows,), jnp.int32))
        table = S((rows, context // pool.page), jnp.int32)
        few = S((min(rows, 2), context // pool.page), jnp.int32)
        small = (
            S((min(rows, 2), pool.heads, pool.head_dim), jnp.bfloat16),
            *fixed[1:3],
            few,
            S((min(rows, 2),), jnp.int32),
        )
        oracle = jax.jit(functools.partial(reference.decode_attention, **options)).lower(*small).compile()
        one = jax.jit(op).lower(*fixed, table).compile()
        return chain(op, carried=True).lower(fixed, ((table,),) * calls).compile(), one, oracle

    def run(compiled: Any) -> dict[str, Any]:
        many, one, oracle = compiled
        kv = pool.arrays(dtype)
        q = jnp.asarray(np.random.default_rng(1).standard_normal((rows, pool.heads, pool.head_dim)), jnp.bfloat16)
        lens = jnp.full((rows,), context, jnp.int32)
        tables = [jnp.asarray(t) for t in page_tables(rows, context, pool, calls)]
        few = slice(0, min(rows, 2))
        error = _relative(one(q, *kv, lens, tables[0])[few], oracle(q[few], *kv, tables[0][few], lens[few]))
        timing = time_chain(lambda: many((q, *kv, lens), tuple((t,) for t in tables)), calls)
        moved = 2 * rows * context * pool.kv_heads * pool.head_dim * jnp.dtype(dtype).itemsize + 4 * q.nbytes
        return {
            "op": "decode_attention",
            "kv": jnp.dtype(dtype).name,
            "rows": rows,
            "context": context,
            "config": str(config) if config else None,
            **timing.row(),
            "bar_us": bar,
            "bytes": moved,
            "gb_per_second": round(moved / timing.us / 1e3),
            "error": round(error, 5),
            "ok": error < ERROR_LIMIT,
        }

    return Task(name, compile, run)


@functools.cache
def _queries(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32).astype(jnp.bfloat16)


@functools.cache
def _prefill_programs(
    context: int, pool: Pool, dtype: Any, config: PrefillConfig | None, tile: int, tiles: int, calls: int, few: int
) -> tuple[Any, Any, Any]:
    """A chain of calls, one call, and the XLA reference on `few` of the tiles; the same whatever the tiles see."""
    scales: dict[str, Any] = {} if jnp.dtype(dtype).itemsize == 2 else dict(k_scale=0.5, v_scale=0.5)
    options: dict[str, Any] = dict(sm_scale=pool.head_dim**-0.5, **scales)

    def op(q: Any, *rest: Any) -> jax.Array:
        if config is None:
            return prefill_attention(q, *rest, **options)
        from pallas_kernels.paged_attention import mosaic_prefill_sm90

        return mosaic_prefill_sm90.prefill_attention(q, *rest, config=config, **options)

    S = jax.ShapeDtypeStruct

    def arguments(tiles: int) -> tuple:
        integers = (S((tiles, context // pool.page), jnp.int32), S((tiles,), jnp.int32), S((tiles,), jnp.int32))
        return (S((tiles, tile, pool.heads, pool.head_dim), jnp.bfloat16), *[pool.abstract(dtype)] * 2, *integers)

    oracle = jax.jit(functools.partial(reference.prefill_attention, **options)).lower(*arguments(few))
    one = jax.jit(op).lower(*arguments(tiles)).compile()
    return chain(op, carried=True).lower(arguments(tiles), ((),) * calls).compile(), one, oracle.compile()


def prefill_task(
    kind: str, context: int, pool: Pool, *, dtype: Any = jnp.bfloat16, config: PrefillConfig | None = None,
    tile: int = 128, queries: int | None = None,
) -> Task:  # fmt: skip
    """The last `queries` (None: all) of `context` tokens, in tiles of `tile`, over pages: "causal" as one chunk of one
    sequence; "full" with every tile at the end of the same `context` keys (only its diagonal block is masked). TFLOP/s
    count the visible keys only."""
    calls, tiles = 8 if context >= 1024 else 2, (queries or context) // tile
    name = f"prefill {kind} {jnp.dtype(dtype).name} {context}" + (f" last {queries}" if queries else "")
    name += f" {config}" if config else ""
    few = np.unique([0, tiles // 2 - 1, tiles - 1])

    def compile() -> Any:
        _queries((tiles, tile, pool.heads, pool.head_dim))  # half a second of numpy, while another has the GPU
        return _prefill_programs(context, pool, dtype, config, tile, tiles, calls, len(few))

    def run(compiled: Any) -> dict[str, Any]:
        many, one, oracle = compiled
        start = context - tile * np.arange(tiles, 0, -1) if kind == "causal" else np.full(tiles, context - tile)
        visible = float(sum((s + 1) * tile + tile * (tile - 1) / 2 for s in start))
        flops = 4 * visible * pool.heads * pool.head_dim
        kv = pool.arrays(dtype)
        rng = np.random.default_rng(0)
        pages = rng.permutation(np.arange(1, pool.pages))[: context // pool.page].astype(np.int32)
        table = np.broadcast_to(pages, (tiles, len(pages)))
        q = _queries((tiles, tile, pool.heads, pool.head_dim))
        integers = [a.astype(np.int32) for a in (table, start, np.full(tiles, tile))]
        args = (jnp.asarray(q), *kv, *(jnp.asarray(a) for a in integers))
        want = oracle(q[few], *kv, *(a[few] for a in integers))
        error = _relative(one(*args)[few], want)
        timing = time_chain(lambda: many(args, ((),) * calls), calls)
        step = args[0]
        for _ in range(calls):
            step = one(step, *args[1:])
        same = bool((step == many(args, ((),) * calls)).all())  # also after thousands of launches
        kernel = timing.kernel_us or timing.us
        return {
            "op": "prefill_attention",
            "kind": kind,
            "kv": jnp.dtype(dtype).name,
            "context": context,
            **({"queries": queries} if queries else {}),
            "config": str(config) if config else None,
            **timing.row(),
            "tflops": round(flops / timing.us / 1e6),
            "kernel_tflops": round(flops / kernel / 1e6),
            "bar_tflops": None if queries else PREFILL_BARS[kind],
            "error": round(error, 5),
            "same_in_chain": same,
            "ok": error < ERROR_LIMIT and same,
        }

    return Task(name, compile, run)


def prefill_tasks(*, sweep: bool = False, quick: bool = False) -> list[Task]:
    """S = 4,096; the op's own choice of config first, with `sweep` every other, then fp8 pages."""
    if quick:
        return [prefill_task("causal", 64, Pool(256, kv_heads=2, head_dim=32), tile=32)]
    context, pool = 4096, Pool(4 * 4096)
    configs: list[PrefillConfig | None] = [None, *(prefill_search_space(HEAD_DIM, PAGE) if sweep else ())]
    tasks = [prefill_task(kind, context, pool, config=c) for c in configs for kind in ("causal", "full")]
    fp8 = [prefill_task(kind, context, pool, dtype=jnp.float8_e4m3fn) for kind in ("causal", "full")]
    return tasks + fp8


def prefill_alternatives(*, quick: bool = False) -> list[Task]:
    """Other configs than the op's own choice at S = 4,096, then their checks over the test table.

    Two measurements of one kernel differ by 1.5 %, which is what these are about: all are timed twice, in turns. The
    chunk of 256 queries is 64 items, which only `split_last` gives to more than 64 multiprocessors. What waits for
    other blocks could hang and is killed after 20 seconds (a first run makes its inputs and oracle in 8).
    """
    if quick:
        return []
    split, *others = OTHER_CONFIGS
    checks = [*config_checks(split), *[t for c in others for t in config_checks(c, ("chunks", "edges", "window"))]]
    timed = [
        prefill_task(kind, 4096, Pool(4 * 4096), config=config)
        for kind in ("full", "causal")
        for config in (PrefillConfig(), *OTHER_CONFIGS)
    ]
    chunk = [
        prefill_task("causal", 8192, Pool(4 * 4096), config=config, queries=256)
        for config in (PrefillConfig(), PrefillConfig(split_last=True))
    ]
    again = [dataclasses.replace(task, key=f"{task.key} again") for task in timed]
    return [dataclasses.replace(task, limit=20.0) for task in (*timed, *chunk, *again, *checks)]


def decode_tasks(*, sweep: bool = False, quick: bool = False) -> list[Task]:
    """The issue's sizes, 16 tokens a page."""
    if quick:
        return [decode_task(2, 32, jnp.bfloat16, Pool(256, kv_heads=2, head_dim=32), bar=None)]
    pool, tasks = Pool(256 * 8192), []
    for name, table in DECODE_BARS.items():
        dtype = jnp.dtype(name)
        for (rows, context), bar in table.items():
            configs: list[DecodeConfig | None] = [None]
            if sweep:
                configs += decode_search_space(HEAD_DIM * dtype.itemsize)
            tasks += [decode_task(rows, context, dtype, pool, bar=bar, config=c) for c in configs]
    return tasks


def _case(kind: str, name: str) -> Case:
    return (DECODE_CASES if kind == "decode" else PREFILL_CASES)[name]


@functools.cache
def _data(kind: str, name: str) -> dict[str, Any]:
    return make(_case(kind, name))


@functools.cache
def _dense(kind: str, name: str) -> np.ndarray:
    case = _case(kind, name)
    return dense_attention(case, _data(kind, name), case.head_dim**-0.5)


def check_task(kind: str, name: str, config: PrefillConfig | None = None) -> Task:
    """One case of the test table, against float64 numpy; prefill with `config` instead of the op's own choice."""
    case = _case(kind, name)
    data = _data(kind, name)
    options: dict[str, Any] = dict(
        sm_scale=case.head_dim**-0.5, window=case.window, soft_cap=case.soft_cap, k_scale=data["k_scale"],
        v_scale=data["v_scale"],
    )  # fmt: skip
    lens = [data["lens"]] if kind == "decode" else [data["lens"][:, 0], data["lens"][:, 1]]
    args = (*(data[n] for n in ("q", "k_pages", "v_pages", "page_table")), *lens)
    op = functools.partial(decode_attention if kind == "decode" else prefill_attention, **options)
    if config is not None:
        from pallas_kernels.paged_attention import mosaic_prefill_sm90

        op = functools.partial(mosaic_prefill_sm90.prefill_attention, config=config, **options)

    def compile() -> Any:
        _dense(kind, name)  # a second of numpy, while another has the GPU
        return jax.jit(op).lower(*args).compile()

    def run(compiled: Any) -> dict[str, Any]:
        got, want = np.asarray(compiled(*args), np.float32), _dense(kind, name)
        error = float(np.abs(got - want).max() / np.abs(want).max())
        return {"op": f"{kind}_check", "error": round(error, 5), "ok": error < ERROR_LIMIT}

    key = f"check {kind} {name}" + (f" {config}" if config else "")
    return Task(key, compile, run)


def config_checks(config: PrefillConfig, names: Sequence[str] = tuple(PREFILL_CASES)) -> list[Task]:
    """The cases `names` of the prefill table, as far as the kernel takes them with `config`."""
    return [
        check_task("prefill", name, config)
        for name, case in PREFILL_CASES.items()
        if name in names
        and case.dtype != "float32"
        and case.q_tile % 128 == 0
        and case.kv_dtype == case.dtype  # fp8 pages need two more stages of shared memory
        and dataclasses.replace(config, early_keys=False, split_last=False)
        in prefill_search_space(case.head_dim, case.page_size)
    ]


def check_tasks(kinds: Sequence[str]) -> list[Task]:
    cases = {"decode": DECODE_CASES, "prefill": PREFILL_CASES}
    return [check_task(kind, name) for kind in kinds for name in cases[kind]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="prefill,decode")
    parser.add_argument("--budget", type=float, default=150, help="seconds")
    parser.add_argument("--out", help="folder of the result files (default bench/results)")
    parser.add_argument("--sweep", action="store_true", help="every config of the search space")
    parser.add_argument("--check", action="store_true", help="the test table first")
    parser.add_argument("--other", action="store_true", help="prefill's other configs only: times, then checks")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try this script without a GPU")
    args = parser.parse_args()
    from bench.record import RESULTS, write

    deadline = time.time() + args.budget
    folder = Path(args.out) if args.out else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    kinds = args.only.split(",")
    tasks: list[Task] = []
    if args.other:
        tasks, kinds = prefill_alternatives(quick=args.quick), []
    if "prefill" in kinds:
        tasks += prefill_tasks(sweep=args.sweep, quick=args.quick)
    if "decode" in kinds:
        tasks += decode_tasks(sweep=args.sweep, quick=args.quick)
    if args.check:
        tasks[2:2] = check_tasks(kinds)  # behind the two rows that a short budget has to reach
    rows = Rows(folder / "paged_attention.jsonl")
    run_tasks(tasks, rows, GpuLock(None), deadline=deadline, threads=12)
    print(write("paged_attention", rows.rows, folder))


if __name__ == "__main__":
    main()
