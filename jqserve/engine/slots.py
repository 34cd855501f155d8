"""Sampling parameters by slot: numpy on the host is the truth, sent to the device when a request changes them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.engine.sampler import RowParams
from jqserve.engine.sequence import Sequence

MAX_BIASES = 336  # entries a slot: 300 of logit_bias (OpenAI's bound) and the stop ids that min_new_tokens bans
FOREVER = np.iinfo(np.int32).max

_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_INTS = ("top_k", "prompt_length", "top_logprobs")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotParams:
    """On the device; S slots and a last row for padding. floats [S+1, 6] float32, ints [S+1, 3] int32, seeds
    [S+1, 2] uint32, bias_ids int32, bias_values float32, bias_until int32 [S+1, E]."""

    floats: jax.Array | np.ndarray
    ints: jax.Array | np.ndarray
    seeds: jax.Array | np.ndarray
    bias_ids: jax.Array | np.ndarray
    bias_values: jax.Array | np.ndarray
    bias_until: jax.Array | np.ndarray

    def prompt_length(self, slots: jax.Array) -> jax.Array:
        return jnp.asarray(self.ints)[slots, _INTS.index("prompt_length")]

    def rows(self, slots: jax.Array, position: jax.Array, generated: jax.Array, prompted: jax.Array) -> RowParams:
        """The parameters of rows: slots, position int32 [R]; generated, prompted [S+1, V]."""
        floats, ints = jnp.asarray(self.floats)[slots], jnp.asarray(self.ints)[slots]
        return RowParams(
            **{name: floats[:, i] for i, name in enumerate(_FLOATS)},
            top_k=ints[:, _INTS.index("top_k")],
            top_logprobs=ints[:, _INTS.index("top_logprobs")],
            seed=jnp.asarray(self.seeds)[slots],
            position=position,
            bias_ids=jnp.asarray(self.bias_ids)[slots],
            bias_values=jnp.asarray(self.bias_values)[slots],
            bias_until=jnp.asarray(self.bias_until)[slots],
            generated=generated[slots],
            prompted=prompted[slots],
        )


def empty(slots: int) -> SlotParams:
    """Host arrays for `slots` slots and the padding row: greedy, nothing penalised, nothing biased."""
    floats = np.zeros((slots + 1, len(_FLOATS)), np.float32)
    floats[:, _FLOATS.index("top_p")] = 1
    floats[:, _FLOATS.index("repetition")] = 1
    ints = np.zeros((slots + 1, len(_INTS)), np.int32)
    ints[:, _INTS.index("top_logprobs")] = -1
    return SlotParams(
        floats,
        ints,
        np.zeros((slots + 1, 2), np.uint32),
        np.full((slots + 1, MAX_BIASES), FOREVER, np.int32),
        np.zeros((slots + 1, MAX_BIASES), np.float32),
        np.zeros((slots + 1, MAX_BIASES), np.int32),
    )


class SlotTable:
    """Host arrays and their copy on the device."""

    def __init__(self, slots: int, sharding: jax.sharding.Sharding | None = None) -> None:
        self.host = empty(slots)
        self._sharding = sharding
        self._device: SlotParams | None = None
        self._stale = True
        self._stale_biases = True  # the device's; nearly all of the bytes, and hardly ever changed
        self._biased: set[int] = set()

    def set(self, sequence: Sequence) -> None:
        """Takes over the parameters of a sequence that got its slot."""
        assert sequence.slot is not None
        slot, sampling, host = sequence.slot, sequence.sampling, self.host
        seed = (sampling.seed or 0) & 0xFFFFFFFFFFFFFFFF
        host.floats[slot] = (  # type: ignore[index]
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        logprobs = -1 if sampling.logprobs is None else sampling.logprobs
        host.ints[slot] = (sampling.top_k, sequence.prompt_length, logprobs)  # type: ignore[index]
        host.seeds[slot] = (seed >> 32, seed & 0xFFFFFFFF)  # type: ignore[index]
        self._set_biases(slot, sequence)
        self._stale = True

    def _set_biases(self, slot: int, sequence: Sequence) -> None:
        sampling, host = sequence.sampling, self.host
        entries = [(token, value, FOREVER) for token, value in sampling.logit_bias]
        if sampling.min_new_tokens:
            until = sequence.prompt_length + sampling.min_new_tokens
            entries += [(token, -np.inf, until) for token in sorted(sequence.stop_ids)]
        if slot in self._biased or entries:
            self._biased.discard(slot)
            host.bias_ids[slot], host.bias_values[slot], host.bias_until[slot] = FOREVER, 0, 0  # type: ignore[index]
            self._stale_biases = True
        if entries:
            self._biased.add(slot)
            ids, values, untils = zip(*entries)
            host.bias_ids[slot, : len(ids)] = ids  # type: ignore[index]
            host.bias_values[slot, : len(ids)] = values  # type: ignore[index]
            host.bias_until[slot, : len(ids)] = untils  # type: ignore[index]

    def on_device(self) -> SlotParams:
        """The device's copy, of which is sent again what changed. The host arrays may change while it is in use."""
        if self._device is None or self._stale:
            names = [f.name for f in dataclasses.fields(SlotParams) if self._stale_biases or f.name[:4] != "bias"]
            sent = jax.device_put({name: np.copy(getattr(self.host, name)) for name in names}, self._sharding)
            self._device = dataclasses.replace(self._device or self.host, **sent)
            self._stale = self._stale_biases = False
        return self._device
