"""XLA's options for the programs of serving."""

from __future__ import annotations

import os

_OPTIONS: dict[str, int | bool] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def compiler_options(captured: bool = True) -> dict[str, int | bool]:
    """For `jax.jit(compiler_options=...)` and `Lowered.compile(...)`: dense matmuls by cuBLAS with the algorithm that
    it proposes, unless XLA_FLAGS says otherwise.

    XLA would time dozens of candidates for each, one program after the other, on buffers of the matmul's own size: for
    the head of an 8B model 1 GiB and more for every program that is being compiled, which are 16 at once. On an H100 of
    80 GB, whose memory the KV pool had taken, starting failed of that; and what wins changes from start to start. bf16
    decode of the 8B shape gives 6,981 / 13,050 tokens/s at batch 64 / 256 with cuBLAS's proposals, 6,668 / 12,913 with
    XLA's winners (H100, bench.decode); compiling takes half the time. Triton's fusions must be off then: not timed, the
    head takes 4.2 ms at 64 rows and 16.8 ms at 256 instead of 0.4.

    captured: in command buffers, where XLA makes them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    uncaptured = {} if captured else {"xla_gpu_graph_min_graph_size": 2**31 - 1}
    return {name: value for name, value in _OPTIONS.items() if name not in flags} | uncaptured
