"""A decoder's MLP as a chain, for `bench.kernel_scaled`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from typing import Any

from bench.kernel_scaled_matmul import random_values
from bench.kernel_session import Session, compiler, measure


def mlp_worker(session: Session) -> None:
    """norm + quantize, gate_up, SiLU + quantize, down; with and without `early_launch`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.quantize import mosaic_sm90 as quantize
    from pallas_kernels.scaled_matmul import mosaic_sm90 as matmul
    from pallas_kernels.scaled_matmul.config import fill_stages, heuristic

    d, f, layers, rounds = 4096, 14336, 3, 4
    f8, S = jnp.float8_e4m3fn, jax.ShapeDtypeStruct
    compile_ = compiler(session)

    def config(m: int, n: int, k: int, early: bool, spare: int) -> Any:
        c = fill_stages(heuristic(m, n, k, block=False), m, k)
        # A multiprocessor that still runs a block of the kernel before has a little less shared memory.
        return dataclasses.replace(c, early_launch=early, stages=max(2, c.stages - spare))

    def layer(x: Any, residual: Any, norm: Any, up: Any, up_scale: Any, down: Any, down_scale: Any, how: Any) -> Any:
        m, (early, spare) = x.shape[0], how
        options = dict(qdtype=f8, divisor=448.0, early_launch=early)
        xq, scale, residual = quantize.rms_norm_quantize(x, norm, residual, eps=1e-5, **options)
        y = matmul.scaled_matmul(xq, up, scale, up_scale, config=config(m, 2 * f, d, early, spare))
        yq, scale = quantize.silu_mul_quantize(y, **options)
        return matmul.scaled_matmul(yq, down, scale, down_scale, config=config(m, d, f, early, spare)), residual

    def build(job: Any) -> Any:
        m, how = job
        inner = jax.jit(functools.partial(layer, how=how))

        def run(x: Any, residual: Any, norm: Any, up_scale: Any, down_scale: Any, *ws: Any) -> Any:
            for _ in range(1 if session.dry else rounds):
                for i in range(0, len(ws), 2):
                    x, residual = inner(x, residual, norm, ws[i], up_scale, ws[i + 1], down_scale)
            return x

        bf, f32 = jnp.bfloat16, jnp.float32
        weights = [S((2 * f, d), f8), S((d, f), f8)] * (1 if session.dry else layers)
        fixed = S((m, d), bf), S((m, d), bf), S((d,), bf), S((2 * f, 1), f32), S((d, 1), f32)
        return compile_(run, *fixed, *weights)

    jobs = [(m, how) for m in (1, 16, 64) for how in ((False, 0), (True, 0), (True, 1))]
    with concurrent.futures.ThreadPoolExecutor(1 if session.dry else 4) as pool:
        built = list(pool.map(build, jobs))
    session.log(compiled=len(built))
    if session.dry:
        return
    make = jax.jit(random_values, static_argnums=(0, 1))
    session.wait_for_others()
    with session.gpu(0):
        ws = [make(s, f8, i) for i in range(layers) for s in ((2 * f, d), (d, f))]
        up_scale, down_scale = (jnp.full((n, 1), 1 / (64 * k**0.5), jnp.float32) for n, k in ((2 * f, d), (d, f)))
        plain: dict[int, Any] = {}
        for (m, how), fn in zip(jobs, built):
            session.doing_now(f"mlp {m} {how}")
            x = jax.random.normal(jax.random.key(1), (m, d), jnp.bfloat16)
            args = (x, x * 0.5, jnp.ones((d,), jnp.bfloat16), up_scale, down_scale, *ws)
            got = np.asarray(fn(*args).astype(jnp.float32))
            row: dict[str, Any] = {"op": "mlp", "m": m, "early_launch": how[0], "stages_less": how[1]}
            if not np.array_equal(plain.setdefault(m, got), got) or not np.isfinite(got).all():
                row["WRONG"] = True
            row |= measure(fn, args, layers * rounds, 0.02)
            session.log(**row)
