"""The quantization ops of `bench.kernel_scaled`, alone."""

from __future__ import annotations

import concurrent.futures
import functools
import math
from collections.abc import Callable
from typing import Any

from bench import kernel_variants
from bench.kernel_session import Session, chain, compiler, measure


def quant_worker(session: Session) -> None:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.quantize import mosaic_sm90, reference

    compile_ = compiler(session)
    kinds = {"row fp8": (jnp.float8_e4m3fn, None, 448.0), "block fp8": (jnp.float8_e4m3fn, 128, 448.0)}
    kinds["row int8"] = (jnp.int8, None, 127.0)
    widths = {"quantize_rows": 4096, "residual_norm": 4096, "silu": 14336}
    S = jax.ShapeDtypeStruct

    def op_of(module: Any, op: str, kind: str, **more: Any) -> Callable[..., Any]:
        qdtype, block, divisor = kinds[kind]
        common = dict(block=block, divisor=divisor, **more)
        if op == "quantize_rows":
            return lambda weight, x, **after: module.quantize_rows(x[0], qdtype, **common, **after)
        if op == "silu":
            return lambda weight, x, **after: module.silu_mul_quantize(x[0], qdtype=qdtype, **common, **after)
        return lambda weight, x, **after: module.rms_norm_quantize(
            x[0], weight, x[1], eps=1e-5, qdtype=qdtype, **common, **after
        )

    jobs: list[tuple[str, str, int, Any]] = []
    for m in (16, 1, 64, 4096, 16384):
        for op, k in widths.items():
            for kind in kinds:
                jobs.append((op, kind, m, None))
            if session.sweep and m in (1, 64) and op == "silu":  # a row shared by a cluster's blocks: may hang, so late
                jobs += [(op, "row fp8", m, mosaic_sm90.Split(wgs, 2, 1, blocks)) for blocks, wgs in ((2, 7), (7, 2))]
            if session.sweep and m in (16, 4096):
                best = mosaic_sm90.split(op, m, k)
                for runs in (1, 2):
                    for wgs in (1, 2, 4, 7, 8):
                        unit = 512 * runs * wgs
                        other = mosaic_sm90.Split(wgs, runs, k // unit)
                        if k % unit == 0 and 4 <= k // (128 * wgs) <= 64 and other != best:
                            jobs.append((op, "row fp8", m, other))

    if session.variants:
        ms = (16, 1, 64, 4096)
        jobs = [job for job in jobs if job[2] in ms and job[1] != "row int8"]
        jobs += [
            (op, kind, m, split)
            for m in ms
            for op in widths
            for kind in ("row fp8", "block fp8")
            for split in kernel_variants.quant_variants(op, m)
            if split != mosaic_sm90.split(op, m, widths[op])
        ]

    def shapes_of(op: str, m: int) -> tuple[int, Any, Any]:
        """(inputs in the chain, the weight, one input)"""
        k = widths[op]
        width = 2 * k if op == "silu" else k
        count = 8 if m <= 64 else max(3, math.ceil(300e6 / (2 * m * width)))
        return count, S((k,), jnp.bfloat16), (S((m, width), jnp.bfloat16),) * (2 if op == "residual_norm" else 1)

    def build(job: tuple[str, str, int, Any]) -> Any:
        op, kind, m, split = job
        count, weight, x = shapes_of(op, m)
        fn = op_of(mosaic_sm90, op, kind, config=split)
        rounds = 1 if session.dry or m > 64 else 4
        timed = compile_(chain(fn, 1, rounds), weight, *[x] * (1 if session.dry else count))
        check = None if (split and not session.variants) or m > 4096 or session.dry else check_of(op, kind, m)
        return timed, check, rounds

    @functools.cache
    def check_of(op: str, kind: str, m: int) -> Any:
        _, weight, x = shapes_of(op, m)
        return compile_(op_of(reference, op, kind), weight, x)

    def try_build(job: Any) -> Any:
        try:
            return build(job)
        except Exception as error:
            session.log(op=job[0], kind=job[1], m=job[2], split=str(job[3]), failed=repr(error)[:300])
            return None

    with concurrent.futures.ThreadPoolExecutor(1 if session.dry else 4) as pool:
        built = list(pool.map(try_build, jobs))
    session.log(compiled=sum(b is not None for b in built), of=len(jobs))
    if session.dry:
        return
    session.wait_for_others()
    built_jobs = [(job, b) for job, b in zip(jobs, built) if b is not None]
    blocks: tuple[int | None, ...] = (None, 1, 2)  # the op's choice; a row in one block; in a cluster, which may hang
    for rank, count in enumerate(blocks):
        some = [(j, b) for j, b in built_jobs if (None if j[3] is None else min(2, j[3].blocks)) == count]
        with session.gpu(1 + 2 * rank):
            time_quants(session, some, shapes_of)


def time_quants(session: Session, pairs: Any, shapes_of: Any) -> None:
    import jax
    import jax.numpy as jnp

    normal = jax.jit(lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16), static_argnums=1)
    made: dict[Any, Any] = {}
    for job, (fn, check, rounds) in pairs:
        op, kind, m, split = job
        if session.left < 2:
            session.log(out_of_time=f"quant {m}")
            return
        session.doing_now(job)
        count, weight_, x_ = shapes_of(op, m)
        row: dict[str, Any] = dict(op=op, kind=kind, m=m, heuristic=split is None)
        try:
            if (op, m) not in made:
                made.clear()
                inputs = [tuple(normal(17 * i + j, x.shape) for j, x in enumerate(x_)) for i in range(count)]
                made[op, m] = (normal(3, weight_.shape), *inputs)
            row |= time_quant(job, fn, check, made[op, m], rounds)
        except Exception as error:
            row["failed"] = repr(error)[:300]
        session.log(**row, split=str(split))


def time_quant(job: Any, fn: Any, check: Any, args: tuple[Any, ...], rounds: int) -> dict[str, Any]:
    import jax.numpy as jnp

    op, _, m, _ = job
    row: dict[str, Any] = {}
    if check is not None:
        got, want = fn(*args), check(args[0], args[-1])
        a, b = got[0].astype(jnp.float32), want[0].astype(jnp.float32)
        row["differing"] = float((a != b).mean())  # 0 for quantize_rows; the others' sums and exponentials differ
        row["worst"] = float((jnp.abs(a - b) / jnp.maximum(jnp.abs(b), 1)).max())
        row["scale_error"] = float(jnp.abs(got[1] / want[1] - 1).max())
        if op == "residual_norm":
            row["residual_equal"] = bool((got[2] == want[2]).all())
        # One step of fp8 is 1/8 of a value at most, one of int8 is 1.
        if row["worst"] > 1 or row["scale_error"] > 1e-5 or (op == "quantize_rows" and row["differing"] > 0):
            row["WRONG"] = True
    row |= measure(fn, args, (len(args) - 1) * rounds, 0.01)
    moved = m * args[0].shape[0] * {"quantize_rows": 3, "silu": 5, "residual_norm": 7}[op]
    row["TBs"] = round(moved / row["us"] / 1e6, 2)
    row["kernel_TBs"] = round(moved / row["kernel_us"] / 1e6, 2)
    return row
