"""Array code for numpy and for jax: whose functions an array wants. jax is imported for its own arrays alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def namespace(array: Any) -> Any:
    """numpy for its own arrays and scalars, else jax.numpy (arrays and tracers). Whoever holds one of those has loaded
    jax; plans and headers hold none, and need not."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    import jax.numpy as jnp

    return jnp
