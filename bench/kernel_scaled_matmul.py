"""The matmuls of `bench.kernel_scaled`: a process per shape and mode, and the test tables on the device."""

from __future__ import annotations

import concurrent.futures
import functools
import math
from typing import Any

from bench import kernel_variants
from bench.kernel_session import Session, chain, compiler, measure

MS = (16, 1, 64, 256, 4096)
# Relative Frobenius error against float32: bf16's rounding is 0.00166; fp8 sums that are never promoted add to it.
ERROR = {"promoted": 0.0022, "fast": 0.0045}


def alternatives(shape: str, m: int, mode: str) -> list[Any]:
    """Configs worth timing beside the heuristic's, from what earlier runs left open."""
    from pallas_kernels.scaled_matmul.cases import LLAMA_8B
    from pallas_kernels.scaled_matmul.config import SMEM_BYTES, Config, fill_stages

    block, small = mode == "block", shape in ("o", "down")
    k = LLAMA_8B[shape][1]
    found: list[Any] = []

    def add(wg_n: int, m_n_k: str = "111", tile_k: int = 128, most: int = 32, **more: Any) -> None:
        wgs_m, wgs_n, wgs_k = map(int, m_n_k)
        epilogue_n = next(e for e in (64, 32, 16) if e <= most and wg_n % e == 0)
        config = Config(wg_n, wgs_m, wgs_n, wgs_k, tile_k=tile_k, epilogue_n=epilogue_n, promote=m <= 64, **more)
        config = fill_stages(config, m, k, 2, block)
        if config.smem_bytes(m, k, 2, block) <= SMEM_BYTES and config not in found:
            found.append(config)

    if m == 1:
        return []
    if m <= 64:
        if small:
            add(32, "112", 512), add(32, "112", 256), add(32, "111", 1024), add(64, "111", 256)
            add(32, "111", 512, cluster=2, cluster_axis="n")
        elif shape == "qkv":
            add(48, "112", 512), add(48, "112", 256), add(48, "111", 512), add(64, "112", 512)
            add(48, "111", 256, cluster=2, cluster_axis="n")
        else:
            add(112, "121", 128), add(112, "121", 256), add(112, "112", 256), add(112, "112", 128), add(64, "121", 256)
            add(112, "111", 256), add(112, "121", 128, cluster=2, cluster_axis="n"), add(64, "112", 512)
    elif m == 256:
        tile = {"qkv": 96, "o": 64, "down": 64, "gate_up": 112 if block else 224}[shape]
        add(tile, "211", 128), add(tile, "211", 256), add(tile, "211", 128, cluster=2)
        if tile < 200:
            add(tile, "212", 128)
        add(tile, "211", 128, cluster=2, cluster_axis="n")
        if shape == "gate_up":
            add(128, "211", 128, m_groups=1 if block else 2), add(112, "211", 128, m_groups=1 if block else 2)
            add(128, "221", 128, 16)
        else:
            add(tile, "212", 256, 16), add(tile, "211", 128, cluster=4, cluster_axis="n"), add(128, "211", 256)
            add(tile, "411", 128)
    elif block:
        add(128, "211"), add(128, "211", 256), add(128, "211", 128, cluster=2, stripe=16)
        add(128, "211", 128, cluster=2, cluster_axis="n"), add(64, "221", 128, 16), add(128, "311")
        add(128, "211", 256, cluster=2, stripe=16), add(64, "221", 128, 16, cluster=2)
    else:
        add(256, "211"), add(256, "211", stripe=4), add(256, "211", cluster=2, stripe=16)
        add(256, "211", cluster=2, cluster_axis="n", stripe=16), add(256, "211", cluster=2)
        add(128, "211", m_groups=2, cluster=2)
    return sorted(found, key=lambda c: c.cluster)  # those that share tiles may hang: last


def operand_shapes(m: int, n: int, k: int, mode: str, weights: int) -> list[Any]:
    import jax
    import jax.numpy as jnp

    dtype = jnp.int8 if mode == "int8" else jnp.float8_e4m3fn
    kb, nb = k // 128, n // 128
    S = jax.ShapeDtypeStruct
    block = mode == "block"
    x_scale = S((m, kb) if block else (m, 1), jnp.float32)
    w_scale = S((nb, kb) if block else (n, 1), jnp.float32)
    return [S((m, k), dtype), x_scale, w_scale, *[S((n, k), dtype)] * weights]


def random_values(shape: tuple[int, ...], dtype: Any, seed: Any) -> Any:
    import jax
    import jax.numpy as jnp

    key = jax.random.key(seed)
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return (jax.random.normal(key, shape, jnp.bfloat16) * 64).astype(dtype)


def exact_product(x: Any, x_scale: Any, w_scale: Any, w: Any) -> Any:
    import jax.numpy as jnp

    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if x_scale.shape[1] > 1:
        x = x * jnp.repeat(x_scale, 128, 1)
        w = w * jnp.repeat(jnp.repeat(w_scale, 128, 0), 128, 1)
        return jnp.matmul(x, w.T, precision="highest")
    return jnp.matmul(x, w.T, precision="highest") * x_scale * w_scale.T


def matmul_worker(session: Session, shape: str, mode: str) -> None:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.scaled_matmul import mosaic_sm90
    from pallas_kernels.scaled_matmul.cases import LLAMA_8B
    from pallas_kernels.scaled_matmul.config import fill_stages, heuristic

    n, k = LLAMA_8B[shape]
    ms = session.ms or (kernel_variants.MS if session.variants else MS)
    weights = max(6, math.ceil(300e6 / (n * k)))
    block = mode == "block"
    compile_ = compiler(session)
    jobs: list[tuple[int, Any, bool]] = []
    for m in ms:
        best = fill_stages(heuristic(m, n, k, block=block), m, k, 2, block)
        jobs.append((m, best, True))
        if session.sweep:
            jobs += [(m, config, False) for config in alternatives(shape, m, mode) if config != best]
        if session.variants:
            others = kernel_variants.matmul_variants(shape, n, k, mode, m)
            jobs += [(m, config, False) for config in others if config != best]

    def calls_of(m: int) -> int:
        return weights if m <= 256 else 4

    def build(job: tuple[int, Any, bool]) -> Any:
        m, config, _ = job

        def op(x: Any, x_scale: Any, w_scale: Any, w: Any, after: Any = None) -> Any:
            return mosaic_sm90.scaled_matmul(x, w, x_scale, w_scale, config=config, after=after)

        try:
            shapes = operand_shapes(m, n, k, mode, 1 if session.dry else calls_of(m))
            return compile_(chain(op, 3, 1), *shapes)
        except Exception as error:
            session.log(shape=shape, mode=mode, m=m, config=str(config), failed=repr(error)[:300])
            return None

    with concurrent.futures.ThreadPoolExecutor(1 if session.dry else 3) as pool:
        jobs.sort(key=lambda job: not job[2])
        built = list(pool.map(build, jobs))
    session.log(compiled=sum(b is not None for b in built), of=len(jobs))
    if session.dry:
        return
    dtype = jnp.int8 if mode == "int8" else jnp.float8_e4m3fn
    make = jax.jit(random_values, static_argnums=(0, 1))
    reference = jax.jit(exact_product)
    with session.gpu(0):
        ws = [jax.block_until_ready(make((n, k), dtype, seed)) for seed in range(weights)]
        for rows in (1, 16, 64):
            session.doing_now(f"reference {rows}")
            reference.lower(*operand_shapes(rows, n, k, mode, 1)).compile()
    session.wait_for_others()
    pairs = list(zip(jobs, built))
    passes = [[p for p in pairs if p[0][2]], [p for p in pairs if not p[0][2]]]
    if session.variants:  # those that might hang last, and between them the heuristic's choice once more
        risks = [[p for p in passes[1] if kernel_variants.risk(p[0][1]) == risk] for risk in range(3)]
        passes = [passes[0], risks[0] + passes[0], risks[1], risks[2]]
    for rank, some in enumerate(passes):
        with session.gpu(3 * rank):
            time_matmuls(session, shape, mode, some, ws, calls_of, make, reference)
        if rank == 0 and session.variants and 4096 in ms and not session.ms:
            with session.gpu(1):
                time_data(session, shape, mode, some, ws, calls_of)


def time_data(session: Session, shape: str, mode: str, pairs: Any, ws: Any, calls_of: Any) -> None:
    """The heuristic's kernel at M = 4096 on other data: what switching bits cost under the power limit."""
    import jax
    import jax.numpy as jnp

    n, k = ws[0].shape
    [fn] = [fn for (m, *_), fn in pairs if m == 4096]
    if fn is None or mode == "int8":
        return
    bits = jax.jit(
        lambda shape, seed: jax.lax.bitcast_convert_type(
            jax.random.bits(jax.random.key(seed), shape, jnp.uint8) & jnp.uint8(0xBF), jnp.float8_e4m3fn
        ),
        static_argnums=0,
    )
    x_, xs_, wsc_, *_ = operand_shapes(4096, n, k, mode, 1)
    for kind in ("zeros", "bits"):
        session.doing_now(f"{shape} {mode} {kind}")
        row = {"op": "data", "shape": shape, "mode": mode, "m": 4096, "data": kind}
        try:
            other = (lambda s, i: jnp.zeros(s, x_.dtype)) if kind == "zeros" else bits
            weights = [other((n, k), i) for i in range(calls_of(4096))]
            args = (other(x_.shape, 99), jnp.ones(xs_.shape), jnp.ones(wsc_.shape), *weights)
            row |= measure(fn, args, calls_of(4096), 0.02)
        except Exception as error:
            row["failed"] = repr(error)[:300]
        session.log(**row)


def time_matmuls(
    session: Session, shape: str, mode: str, pairs: Any, ws: Any, calls_of: Any, make: Any, reference: Any
) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    n, k = ws[0].shape
    for m in sorted({job[0] for job, _ in pairs}, key=lambda m: MS.index(m) if m in MS else m):
        session.beat = 0.0
        mine = [(job, fn) for job, fn in pairs if job[0] == m and fn is not None]
        if not mine:
            continue
        x_, xs_, wsc_, *_ = operand_shapes(m, n, k, mode, 1)
        session.doing_now(f"data {m}")
        x = make(x_.shape, x_.dtype, 99)
        x_scale = jax.random.uniform(jax.random.key(5), xs_.shape) * 0.01 + 0.001
        w_scale = jax.random.uniform(jax.random.key(6), wsc_.shape) * 0.01 + 0.001
        rows = np.arange(m) if m <= 64 else np.linspace(0, m - 1, 64).astype(int)
        calls = calls_of(m)
        want = np.asarray(reference(x[rows], x_scale[rows], w_scale, ws[calls - 1]))
        args = (x, x_scale, w_scale, *ws[:calls])
        for (_, config, chosen), fn in mine:
            if session.left < 2:
                session.log(out_of_time=f"{shape} {mode} {m}")
                return
            session.doing_now(f"{shape} {mode} {m} {config}")
            row: dict[str, Any] = dict(op="scaled_matmul", shape=shape, mode=mode, m=m, heuristic=chosen)
            try:
                one, two = fn(*args), fn(*args)
                got = np.asarray(one[rows].astype(jnp.float32))
                error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
                row["error"], row["repeats"] = round(error, 5), bool((one == two).all())
                fast = mode == "row" and not config.promote
                if not error < ERROR["fast" if fast else "promoted"] or not row["repeats"]:
                    row["WRONG"] = True
                del one, two
                row |= measure(fn, args, calls, 0.02 if chosen or m == 4096 else 0.01)
                row["TBs"] = round(n * k / row["us"] / 1e6, 2)
                row["TFLOPs"] = round(2 * m * n * k / row["us"] / 1e6)
            except Exception as error:
                row["failed"] = repr(error)[:300]
            session.log(**row, config=str(config))


def cases_worker(session: Session) -> None:
    """Every case of the tests' table on this device, against float64; refusals with their reason."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.scaled_matmul import mosaic_sm90
    from pallas_kernels.scaled_matmul.cases import CASES, DEVICE_CASES, error_bound, expected, make

    compile_ = compiler(session)
    ready = []
    checks: list[tuple[Any, Any]] = [(case, None) for case in (*CASES, *DEVICE_CASES)]
    if session.variants:
        checks = list(kernel_variants.CHECKS)
    for case, config in checks:
        session.beat = 0
        operands = make(case)
        shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands if o is not None]
        try:
            fn = functools.partial(mosaic_sm90.scaled_matmul, out_dtype=case.out_dtype, config=config)
            ready.append(((case, config), operands, compile_(fn, *shapes)))
        except NotImplementedError as error:
            session.log(case=str((case, config)), refused=str(error)[:150])
        except Exception as error:
            session.log(case=str((case, config)), failed=repr(error)[:300])
    session.log(compiled=len(ready))
    if session.dry:
        return
    session.wait_for_others()
    with session.gpu(1):
        for (case, config), operands, fn in ready:
            session.doing_now((case, config))
            try:
                got = np.asarray(fn(*[jnp.asarray(o) for o in operands if o is not None])).astype(np.float64)
                want, magnitude = expected(*operands)
                worst = float((np.abs(got - want) / error_bound(case, want, magnitude, tensor_cores=True)).max())
                row: dict[str, Any] = {} if worst <= 1 else {"WRONG": True}
                session.log(case=str((case, config)), worst_over_bound=round(worst, 3), **row)
            except Exception as error:
                session.log(case=str((case, config)), failed=repr(error)[:300])
