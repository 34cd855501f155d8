"""What reading ahead (`jqserve.ops.ahead`) saves: time of a decode step's layers, by who asks for how much.

    python -m bench.ahead [--schemes fp8,w4a16,bf16] [--batches 1,64] [--context 1024] [--most N] [--budget SECONDS]
                          [--quick] [--out DIR]

A few layers of the Llama-3.1-8B shape (more weights than L2 holds), as the engine runs them, over pages, in one program
with command buffers on, called again and again; random weights. A row per scheme, batch and choice:

    ahead       bytes by the kernel that asks; {} is the step as it is. piece: bytes of one request
    layer_us    wall clock of a layer: the median of 5 bursts
    kernel_us   durations of a layer's kernels by CUPTI, which a slow host does not touch
    ratio       to {} of the same scheme and batch, which is timed before and after the others
    same        whether the hidden state is that of {}, bit for bit

Programs are compiled side by side before any is timed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import record
from bench.llama8b import QUICK, make_checkpoint

SITES = ("attn_norm", "rope", "mlp_norm", "silu")
LAYERS, PAGE = 16, 64  # the device takes longer for so many than the host takes to launch them
MIB = 1 << 20


def choices() -> list[tuple[dict[str, int], int]]:
    """(bytes by who asks, bytes of a request), the most telling first: a stopped run has those."""
    from pallas_kernels.ahead import PIECE

    found: list[tuple[dict[str, int], int]] = [({}, PIECE)]
    found += [
        ({"rope": 8 * MIB}, PIECE),
        ({"mlp_norm": 8 * MIB}, PIECE),
        ({"rope": 4 * MIB, "mlp_norm": 4 * MIB}, PIECE),
    ]
    found += [
        ({"silu": 8 * MIB}, PIECE),
        ({"attn_norm": 8 * MIB}, PIECE),
        ({"rope": 8 * MIB, "mlp_norm": 8 * MIB}, 2048),
    ]
    found += [(dict.fromkeys(SITES, size * MIB), PIECE) for size in (8, 2, 16, 24)]
    found += [(dict.fromkeys(SITES, 8 * MIB), piece) for piece in (2048, 4096, 65536)]
    found += [({site: 16 * MIB}, PIECE) for site in SITES]
    # Attention of few tokens comes between the rotary embedding and o: there is time for more than o.
    return [*found, ({"rope": 32 * MIB}, PIECE), ({"rope": 16 * MIB, "mlp_norm": 4 * MIB, "silu": 4 * MIB}, PIECE)]


class Steps:
    """The layers of one scheme at one batch size, as programs by choice."""

    def __init__(self, scheme: str, batch: int, context: int, quick: bool) -> None:
        import jax
        import jax.numpy as jnp

        from jqserve.checkpoint.dummy import load
        from jqserve.engine.places import hold_places
        from jqserve.models.build import build, split
        from jqserve.ops.attention import AttentionMetadata
        from jqserve.ops.relayout import place

        with tempfile.TemporaryDirectory() as folder:
            changes: dict[str, Any] = QUICK if quick else {"num_hidden_layers": LAYERS}
            make_checkpoint(Path(folder), scheme, **changes)
            loaded = load(Path(folder), dtype=None, device_put=place)
        self.config, dtype = loaded.config, loaded.params["embed"]["weight"].dtype
        self.structure, self.leaves = split(build(loaded.config, loaded.params))
        each = -(-(context + 1) // PAGE)
        shape = (1 + batch * each, self.config.kv_heads, PAGE, self.config.head_dim)
        keys = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
        self.kv = tuple((keys + i, keys - i) for i in range(self.config.layers))
        table = 1 + jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)
        slots = table[:, -1] * PAGE + context % PAGE
        none = jnp.zeros((0,), jnp.int32)
        lengths = jnp.full((batch,), context + 1, jnp.int32)
        meta = AttentionMetadata(slots, table, lengths, jnp.zeros((0, each), jnp.int32), none, none)
        tokens = jnp.arange(batch, dtype=jnp.int32) + 5
        self.fixed = (tokens, lengths - 1, meta)
        self.places = hold_places(jax.devices()[0])  # as in the engine: the temporary buffer stays where it is

    def lower(self, sizes: dict[str, int], piece: int) -> Any:
        """One at a time: what is asked for is looked up while tracing."""
        import jax

        from jqserve.ops import ahead
        from jqserve.ops.compiler_options import compiler_options

        def step(leaves: Any, kv: Any, tokens: Any, positions: Any, meta: Any) -> Any:
            return self.structure.merge(leaves)(tokens, positions, kv, meta)

        jax.clear_caches()
        ahead.BYTES, ahead.PIECE = sizes, piece
        options = compiler_options() if jax.default_backend() == "gpu" else None
        return jax.jit(step, donate_argnums=1, compiler_options=options).lower(self.leaves, self.kv, *self.fixed)

    def time(self, program: Any, seconds: float = 0.03) -> tuple[float, float, Any]:
        """(us of a layer, us of its kernels, the hidden state)"""
        import jax
        import numpy as np

        from bench.kernel_times import kernel_times

        hidden = None

        def burst(calls: int) -> float:
            nonlocal hidden
            begin = time.perf_counter()
            for _ in range(calls):
                hidden = None  # the next one lies where it lay: no command buffer has to be updated
                hidden, self.kv = program(self.leaves, self.kv, *self.fixed)
            jax.block_until_ready(hidden)
            return (time.perf_counter() - begin) / calls

        burst(3)
        calls = max(3, min(200, int(seconds / burst(3))))
        us = statistics.median(burst(calls) for _ in range(5)) / self.config.layers * 1e6
        kernels = kernel_times(lambda: burst(3)) or []
        return us, sum(each for _, each in kernels) / 3 / self.config.layers, np.asarray(hidden)


def rows_of(scheme: str, batch: int, args: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    import numpy as np

    steps, tried = Steps(scheme, batch, args.context, args.quick), choices()[: 3 if args.quick else args.most]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        flying = []
        for choice in tried:
            if time.monotonic() > deadline:
                break
            flying.append(pool.submit(steps.lower(*choice).compile))
        programs = [each.result() for each in flying]
    rows: list[dict[str, Any]] = []
    before, _, plain = steps.time(programs[0])
    for (sizes, piece), program in zip(tried, programs):
        us, kernel_us, hidden = steps.time(program)
        same = bool(np.array_equal(hidden, plain)) and bool(np.isfinite(hidden.astype(np.float32)).all())
        row = {"scheme": scheme, "batch": batch, "context": args.context, "ahead": sizes, "piece": piece}
        rows.append(row | {"layer_us": round(us, 2), "kernel_us": round(kernel_us, 2), "same": same})
    base = (before + steps.time(programs[0])[0]) / 2
    for row in rows:
        row["ratio"] = round(row["layer_us"] / base, 4)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--schemes", default="fp8,w4a16,bf16")
    add("--batches", default="1,64")
    add("--context", type=int, default=1024)
    add("--most", type=int, help="choices")
    add("--budget", type=float, default=200.0, help="seconds after which no program is lowered any more")
    add("--quick", action="store_true", help="a tiny model and few choices: checks the script")
    add("--out", help="default: bench/results")
    args = parser.parse_args()
    deadline, rows = time.monotonic() + args.budget, []
    for scheme in args.schemes.split(","):
        for batch in map(int, args.batches.split(",")):
            if time.monotonic() > deadline:
                rows.append({"scheme": scheme, "batch": batch, "failed": "no time was left"})
                continue
            try:
                rows += rows_of(scheme, batch, args, deadline)
            except Exception as error:  # the other cases are worth having
                rows.append({"scheme": scheme, "batch": batch, "failed": f"{type(error).__name__}: {error}"[:400]})
                print(rows[-1], flush=True)
            record.write("ahead", rows, args.out, layers=LAYERS)
    print(record.write("ahead", rows, args.out, layers=LAYERS))


if __name__ == "__main__":
    main()
