"""XLA's options for the programs of serving."""

from __future__ import annotations

import os

AUTOTUNING = "xla_gpu_autotune_level"


def compiler_options() -> dict[str, str]:
    """For `jax.jit(compiler_options=...)` and `Lowered.compile(...)`: no autotuning, unless XLA_FLAGS asks for a level.

    XLA times dozens of candidates for every dense matmul, one program after the other, on buffers of the matmul's own
    size: for the head of an 8B model 1 GiB and more for each program that is being compiled, which are 16 at once. On
    an H100 of 80 GB, whose memory the KV pool had taken, starting failed of that. Its defaults are as good: bf16 decode
    of the 8B shape gives 169.5 / 6,668 / 13,026 tokens/s at batch 1 / 64 / 256 without, 169.7 / 6,668 / 12,913 with,
    prefill is 3 % slower, and compiling takes 8.6 s instead of 20.5 (H100, bench.decode).
    """
    return {} if AUTOTUNING in os.environ.get("XLA_FLAGS", "") else {AUTOTUNING: "0"}
