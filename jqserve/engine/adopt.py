"""A slot's device state for a sequence that begins behind a cached prefix: two small jitted programs.

A step only hears of the positions that it computes. What stands before them, pages and (for penalties) tokens, is put
into the slot's state here, before the step that admits the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Items
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqserve.engine.batch import StepShape
from jqserve.engine.plan import Adopted
from jqserve.engine.sampler import MAX_COUNT
from jqserve.engine.step import SlotState
from jqserve.engine.variant import counts_tokens

AT_ONCE = 8  # sequences whose pages one call sets
TOKENS = 2048  # tokens that one call counts


class Adopter:
    """The compiled programs for one engine. `warm_up` before serving; `__call__` never compiles after that."""

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        self._set_pages = jax.jit(_set_pages, donate_argnums=0)
        self._count = jax.jit(_count, donate_argnums=0)

    def warm_up(self, state: SlotState) -> SlotState:
        """Runs both on padding; the state stays what it is."""
        return self._count_tokens(self._pages(state, []), self.shape.slots, (), 0)

    def __call__(self, state: SlotState, adopted: Items[Adopted]) -> SlotState:
        for start in range(0, len(adopted), AT_ONCE):
            state = self._pages(state, adopted[start : start + AT_ONCE])
        for one in adopted:
            if counts_tokens(one.sequence):
                tokens = one.sequence.tokens[: one.tokens]
                state = self._count_tokens(state, one.slot, tokens, one.sequence.prompt_length)
        return state

    def _pages(self, state: SlotState, adopted: Items[Adopted]) -> SlotState:
        slots = np.full(AT_ONCE, self.shape.slots, np.int32)
        tables = np.zeros((AT_ONCE, self.shape.pages_per_sequence), np.int32)
        for i, one in enumerate(adopted):
            slots[i] = one.slot
            tables[i, : len(one.pages)] = one.pages
        return dataclasses.replace(state, page_table=self._set_pages(state.page_table, slots, tables))

    def _count_tokens(self, state: SlotState, slot: int, tokens: Items[int], prompt_length: int) -> SlotState:
        counts: Any = (state.generated, state.prompted)
        for start in range(0, max(1, len(tokens)), TOKENS):
            part = np.full(TOKENS, self.shape.vocab_size, np.int32)
            here = tokens[start : start + TOKENS]
            part[: len(here)] = here
            facts = np.array([slot, prompt_length - start, start == 0], np.int32)
            counts = self._count(counts, part, facts)
        return dataclasses.replace(state, generated=counts[0], prompted=counts[1])


def _set_pages(table: jax.Array, slots: jax.Array, pages: jax.Array) -> jax.Array:
    """table [S+1, Pmax], slots int32 [A] (S: padding), pages int32 [A, Pmax]."""
    return table.at[slots].set(pages)


def _count(counts: tuple[jax.Array, jax.Array], tokens: jax.Array, facts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """generated, prompted [S+1, V]; tokens int32 [TOKENS] (V: none); facts: slot, how many tokens are of the prompt,
    whether to begin at zero."""
    generated, prompted = counts
    slot, of_prompt, clear = facts
    is_prompt = jnp.arange(tokens.shape[0]) < of_prompt
    nothing = generated.shape[1]
    row = jnp.where(clear == 1, 0, generated[slot]).astype(jnp.int32)
    seen = jnp.where(clear == 1, False, prompted[slot])
    row = row.at[jnp.where(is_prompt, nothing, tokens)].add(1, mode="drop")
    seen = seen.at[jnp.where(is_prompt, tokens, nothing)].set(True, mode="drop")
    row = jnp.minimum(row, MAX_COUNT).astype(generated.dtype)
    return generated.at[slot].set(row), prompted.at[slot].set(seen)
