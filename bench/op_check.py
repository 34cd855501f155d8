"""The small kernels of a layer on this device against their XLA form: rope_write, rms_norm, silu_mul.

    python -m bench.op_check [--out DIR]

(The products, the quantization and the attention are checked by `bench.kernels` and `bench.kernel_*`, which time them.)
An error is the largest difference over the largest value; bf16's rounding is 0.004 of a value. Pages must be equal to
the last bit outside the slots that are written. Exit 1 when one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BOUND = 0.009  # two roundings of bf16 where the orders of operations differ
PAGES, PAGE_SIZE = 300, 64


def distance(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max()) if np.isfinite(got).all() else float("inf")


def rope_write_error(tokens: int, heads: int, kv_heads: int, head_dim: int) -> float:
    from pallas_kernels.rope_write.api import rope_write

    keys = jax.random.split(jax.random.key(tokens + heads), 5)
    qkv = jax.random.normal(keys[0], (tokens, (heads + 2 * kv_heads) * head_dim), jnp.bfloat16)
    angle = jax.random.uniform(keys[1], (tokens, head_dim // 2), jnp.float32, -3, 3)
    slots = jax.random.permutation(keys[2], PAGES * PAGE_SIZE)[:tokens].astype(jnp.int32)
    slots = slots.at[::5].set(0)  # padding
    pages = [jax.random.normal(k, (PAGES, kv_heads, PAGE_SIZE, head_dim), jnp.bfloat16) for k in keys[3:]]

    def run(implementation: str) -> Any:
        def op(qkv: Any, k_pages: Any, v_pages: Any) -> Any:
            return rope_write(
                qkv, jnp.cos(angle), jnp.sin(angle), slots, k_pages, v_pages, implementation=implementation
            )

        return jax.jit(op, donate_argnums=(1, 2))(qkv, *(jnp.copy(p) for p in pages))

    got, want = run("mosaic_sm90"), run("xla")
    # Page 0 is the trash page: nobody promises what is in it.
    return max(distance(got[0], want[0]), *(distance(g[1:], w[1:]) for g, w in zip(got[1:], want[1:])))


def rms_norm_error(rows: int, columns: int) -> float:
    from pallas_kernels.rows.api import rms_norm

    keys = jax.random.split(jax.random.key(rows), 3)
    x, residual = (jax.random.normal(k, (rows, columns), jnp.bfloat16) for k in keys[:2])
    weight = jax.random.normal(keys[2], (columns,), jnp.bfloat16)
    got, want = (rms_norm(x, weight, residual, eps=1e-5, implementation=i) for i in ("mosaic_sm90", "xla"))
    return max(distance(g, w) for g, w in zip(got, want))


def silu_mul_error(rows: int, columns: int) -> float:
    from pallas_kernels.rows.api import silu_mul

    x = jax.random.normal(jax.random.key(rows), (rows, 2 * columns), jnp.bfloat16) * 3
    return distance(silu_mul(x, implementation="mosaic_sm90"), silu_mul(x, implementation="xla"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder of the result file (default bench/results)")
    args = parser.parse_args()
    cases: list[tuple[Callable[..., float], tuple[int, ...]]] = [
        *((rope_write_error, (t, 32, 8, 128)) for t in (1, 64, 1152)),
        (rope_write_error, (33, 14, 2, 64)),
        (rope_write_error, (64, 4, 2, 64)),
        *((rms_norm_error, (m, k)) for m, k in ((1, 4096), (64, 4096), (1152, 4096), (8, 512))),
        *((silu_mul_error, (m, k)) for m, k in ((1, 14336), (64, 14336), (1152, 14336), (8, 1536))),
    ]
    rows: list[dict[str, Any]] = []
    for check, sizes in cases:
        row: dict[str, Any] = {"op": check.__name__.removesuffix("_error"), "sizes": sizes}
        try:
            error = check(*sizes)
            row |= {"error": round(error, 6), "ok": error < BOUND}
        except Exception as failure:  # the others are still worth knowing
            row |= {"failed": f"{type(failure).__name__}: {failure}"[:300], "ok": False}
        rows.append(row)
        print(json.dumps(row), flush=True)
    from bench.record import write

    print(write("op_check", rows, args.out, bound=BOUND))
    if not all(row["ok"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
