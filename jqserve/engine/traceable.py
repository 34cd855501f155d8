"""A program that is still to be traced and lowered, here or in another process."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

#: Held while a program is traced and lowered in this process, which is one core's work under the interpreter's lock: 16
#: threads that contend for that lock took 45 s for what one after the other takes half of.
_lowering = threading.Lock()


def alone[T](lower: Callable[[], T]) -> T:
    with _lowering:
        return lower()


@dataclasses.dataclass(frozen=True)
class Traceable:
    """What is jitted: a function of arrays, the arguments (arrays or ShapeDtypeStructs, pytrees of them) and which of
    them are donated."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]

    def lower(self) -> jax.stages.Lowered:
        return self._jitted(self.function).lower(*self.arguments)

    def exported(self, platform: str) -> bytes:
        """Traced and lowered for `platform` ("cuda", "cpu"), whatever is in this machine: StableHLO and the shape of
        what comes out. Raises what tracing raises, and ValueError for what cannot leave the process."""
        leaves, tree = jax.tree.flatten(self.arguments)
        abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        outputs: list[Any] = []

        def flat(*leaves: Any) -> list[Any]:
            found, structure = jax.tree.flatten(self.function(*jax.tree.unflatten(tree, leaves)))
            outputs.append(jax.tree.unflatten(structure, range(len(found))))
            return found

        # Custom calls that promise nothing to other versions: what is exported never meets another version.
        unchecked = [export.DisabledSafetyCheck.custom_call(target) for target in ("mosaic_gpu_v2", "mosaic_gpu")]
        module = export.export(jax.jit(flat), platforms=(platform,), disabled_checks=unchecked)(*abstract)
        return pickle.dumps((module.serialize(), outputs[-1]))

    def imported(self, content: bytes) -> jax.stages.Lowered:
        """What `lower` gives, from what `exported` gave in a process of ours: 13 ms instead of seconds."""
        serialized, outputs = pickle.loads(content)
        module, structure = export.deserialize(bytearray(serialized)), jax.tree.structure(outputs)
        used = set(module.module_kept_var_idx)

        def call(*arguments: Any) -> Any:
            leaves = jax.tree.leaves(arguments)
            # An argument that is not used must not seem so, or every launch would hand it over.
            given = [x if i in used else jnp.zeros(x.shape, x.dtype) for i, x in enumerate(leaves)]
            return jax.tree.unflatten(structure, module.call(*given))

        return self._jitted(call).lower(*self.arguments)

    def _jitted(self, function: Callable[..., Any]) -> Any:
        function.__name__ = self.name  # type: ignore[attr-defined]  # in profiles
        return jax.jit(function, donate_argnums=self.donated)
