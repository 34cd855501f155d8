"""Which implementation of scaled_matmul runs where, and in which configuration: from shapes and dtypes, without jax."""

from __future__ import annotations

from typing import Any

from pallas_kernels import tuning
from pallas_kernels.dispatch import Candidate, Shaped, current_device, hopper_only
from pallas_kernels.scaled_matmul.config import SMEM_BYTES, Config, fill_stages, heuristic, search_space

OP = "scaled_matmul"
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def refuse(m: int, n: int, k: int, dtype: Any) -> None:
    """Raises NotImplementedError for shapes that TMA cannot copy without another copy of the weight first."""
    if 0 in (m, n, k):
        raise NotImplementedError(f"{'MNK'[(m, n, k).index(0)]} = 0: nothing to compute")
    if n % 8:
        raise NotImplementedError(f"N must be a multiple of 8 (rows of a TMA tile), got {n}")
    if k % 128 and (k > 128 or k % 16):
        raise NotImplementedError(f"K must be a multiple of 128, or of 16 below 128 (TMA tiles), got {k}")
    if str(dtype) == "int8" and k >= 2**17:
        raise NotImplementedError(f"int8 sums of K = {k} products may exceed int32 (K < 131072)")


def whole_rows(m: int) -> int:
    """M as the kernel takes it: TMA tiles have 8 rows, but the only one may be short."""
    return m if m <= 8 else -(-m // 8) * 8


def scale_kind(scale: Shaped) -> str:
    if tuple(scale.shape) == (1, 1):
        return "tensor"
    return "vector" if scale.shape[1] == 1 else "block"


def multiprocessors() -> int:
    return current_device().core_count or 132


def choose_config(
    m: int, n: int, k: int, dtype: Any, block: bool, out_bytes: int, config: Config | None = None
) -> Config:
    """The kernel's configuration for whole rows of M; `config` None chooses. Raises NotImplementedError for one that
    the kernel cannot run."""
    int8 = str(dtype) == "int8"

    def runnable(c: Config) -> Config:
        if c.overwrite and int8:
            raise NotImplementedError(f"overwrite is for fp8, got int8 and {c}")
        if reason := c.refusal(m, n, k, block):
            raise NotImplementedError(reason)
        if c.smem_bytes(m, k, out_bytes, block) > SMEM_BYTES:
            raise NotImplementedError(f"{c} needs {c.smem_bytes(m, k, out_bytes, block)} bytes of shared memory")
        return c

    def fitted(c: Config) -> Config:  # float32 output stages more
        return c if c.smem_bytes(m, k, out_bytes, block) <= SMEM_BYTES else fill_stages(c, m, k, out_bytes, block)

    if config is None:
        sms = multiprocessors()
        config = tuning.choose(
            OP,
            tuning.key(m=tuning.bucket(m), n=n, k=k, dtype=str(dtype), scales="block" if block else "row"),
            heuristic=lambda: fill_stages(heuristic(m, n, k, block=block, sms=sms, fp8=not int8), m, k, 2, block),
            space=lambda: (c for c in search_space(m, n, k, block=block, sms=sms) if not (int8 and c.overwrite)),
            check=lambda c: runnable(fitted(c)),
        )
        config = fitted(config)
    return runnable(config)


def _takes(
    xq: Shaped, wq: Shaped, x_scale: Shaped, w_scale: Shaped, bias: Shaped | None = None, *, out_dtype: Any = "bfloat16"
) -> Config:
    (m, k), n = xq.shape, wq.shape[0]
    refuse(m, n, k, xq.dtype)
    block = "block" in (scale_kind(x_scale), scale_kind(w_scale))
    return choose_config(whole_rows(m), n, k, xq.dtype, block, _ITEMSIZE[str(out_dtype)])


CANDIDATES = (Candidate("mosaic_sm90", hopper_only, _takes), Candidate("xla"))
