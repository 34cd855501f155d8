"""How fast this device reads its memory: the denominator of every "share of the bound"."""

from __future__ import annotations


def read_bandwidth() -> float | None:
    """Bytes per second of a sum over 2 GiB on the GPU, by the kernel's own time; None on a CPU.

    The wall clock of one call would not do: the host's round trip adds a quarter to the half millisecond of the sum.
    """
    import jax

    from bench.timing import hbm_bytes_per_second

    return None if jax.default_backend() == "cpu" else hbm_bytes_per_second()
