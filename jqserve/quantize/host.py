"""Arrays that wait on the host for their next use on the device.

On a GPU they lie in pinned memory, which both directions copy at the bus's speed and beside the kernels. Through
ordinary memory a layer of the 8B shape moved its 8.6 GB of activations in at 8 GB/s and out at 2 (an H200's host),
which was most of a run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

Kept = np.ndarray | jax.Array


def pins() -> bool:
    """Whether the device copies from pinned memory."""
    return jax.devices()[0].platform == "gpu"


def keep(x: Kept, *, pinned: bool | None = None) -> Kept:
    """x on the host. `pinned`: in pinned memory; None: on a GPU."""
    if pins() if pinned is None else pinned:
        return jax.device_put(x, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
    return np.asarray(x)


def fetch(x: Kept) -> jax.Array:
    """A copy of its own on the device, which may be donated."""
    if isinstance(x, np.ndarray):
        return jnp.array(x)
    return jax.device_put(x, SingleDeviceSharding(jax.devices()[0]))
