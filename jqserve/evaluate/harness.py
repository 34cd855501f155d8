"""lm-evaluation-harness on jqserve (`pip install jqserve[eval]`).

    jqserve-lm-eval run --model jqserve --model_args pretrained=DIR --tasks hellaswag
    python -m jqserve.evaluate.harness ...      the same

takes every argument of `lm_eval`, which has no way to find models outside itself: this command registers ours first.
In a program, importing this module is enough for `lm_eval.simple_evaluate(model="jqserve", ...)`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from jqserve.checkpoint.hub import resolve
from jqserve.engine.request import SamplingParams
from jqserve.errors import RequestError
from jqserve.evaluate.engines import Generator, tokenizer_of
from jqserve.library import load

log = logging.getLogger(__name__)

#: Logits on the device at a time: tokens x vocabulary.
LOGITS = 1 << 26
#: What lm_eval passes to every model; here memory and the engine decide.
IGNORED = {"batch_size", "max_batch_size", "device"}
#: Names of the number of new tokens in generation_kwargs, the first one given counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: generation_kwargs that are taken.
GENERATION = {*LIMITS, "until", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


@register_model("jqserve")
class JqserveLM(LM):
    """pretrained: a checkpoint directory or a Hub id of the local cache. dtype, activations: as in `jqserve.load`.
    max_length: tokens of context, default the model's own but at most 4096."""

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        activations: Any = "config",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **others: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(others) - IGNORED):
            raise RequestError(
                "model_args",
                f"{', '.join(unknown)} not known; there are pretrained, dtype, activations, max_length, max_gen_toks",
            )
        self.model, self.params = load(pretrained, dtype=dtype, activations=activations)
        self.tokenizer = tokenizer_of(str(resolve(pretrained)))
        self.max_length = int(max_length or min(self.model.config.max_position, 4096))
        self.max_gen_toks = int(max_gen_toks)
        self._generator = Generator(pretrained, dtype, self.max_length, activations)
        self._name = pretrained

    @property
    def prefix(self) -> int:
        """What an empty context becomes."""
        config = self.model.config
        if config.bos_token_id is not None:
            return config.bos_token_id
        return config.eos_token_ids[0] if config.eos_token_ids else 0

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "the checkpoint's own" if self.tokenizer.chat is not None and chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without a generation prompt the last message is the beginning of the answer (a task's gen_prefix): the text
        ends with it, as transformers' continue_final_message has it, and not with the end of a turn."""
        text = self.tokenizer.need_chat().render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = str(chat_history[-1]["content"])
        for part in (begun, begun.rstrip(), begun.strip()):  # templates trim
            if (at := text.rfind(part)) >= 0:
                return text[: at + len(part)]
        raise RequestError(
            "gen_prefix", f"the model's chat template does not show the answer begun with, {begun!r:.80}"
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log probability of the continuation, whether greedy decoding gives it) of each (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        return self._score([(before, after) for before, after in pairs])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log probability of each text; a long one in windows that overlap, each token counted once and with as much
        context as there is room for."""
        pieces: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            for begin in range(0, len(ids), self.max_length):
                end = min(begin + self.max_length, len(ids))
                first = max(0, end - self.max_length)
                context = [self.prefix] if first == 0 else [ids[first - 1]]
                pieces.append(([*context, *ids[first:begin]], ids[begin:end]))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owner, self._score(pieces)):
            totals[i] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, greedily unless the task samples, up to one of its stops."""
        prompts, sampling = [], []
        unknown = sorted({key for request in requests for key in request.args[1]} - GENERATION)
        if unknown:
            log.warning("warning: gen_kwargs: %s do nothing here; there are %s", unknown, sorted(GENERATION))
        for request in requests:
            context, options = request.args
            limit = limit_of(options, self.max_gen_toks)
            sampling.append(sampling_of(options, limit))
            if limit >= self.max_length:
                raise RequestError(
                    "max_gen_toks", f"{limit} leave no room for a prompt in max_length {self.max_length}; raise that"
                )
            ids = self.tokenizer.encode(context, add_special_tokens=False) or [self.prefix]
            prompts.append(ids[-(self.max_length - limit) :])
        return [done.text for done in self._generator.engine.generate(prompts, sampling)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. Spaces at the end of a context belong to what follows: that is how tokenizers cut words."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        if not context:
            ids = self.tokenizer.encode(continuation, add_special_tokens=False)
            return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])  # once, as lm_eval has it
        whole = self.tokenizer.encode(context + continuation, add_special_tokens=False)
        before = self.tokenizer.encode(context, add_special_tokens=False)
        return whole[: len(before)], whole[len(before) :]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for _, after in pairs:
            if len(after) > self.max_length:
                raise RequestError(
                    "max_length", f"a continuation has {len(after)} tokens, more than max_length {self.max_length}"
                )
        cut = [[*before, *after][-(self.max_length + 1) :] for before, after in pairs]
        order = sorted(range(len(pairs)), key=lambda i: len(cut[i]))
        while order:
            width = -(-len(cut[order[-1]]) // 64) * 64
            size = max(1, min(64, LOGITS // (width * self.model.config.vocab_size)))
            chosen, order = order[-size:], order[:-size]
            ids = np.zeros((size, width), np.int32)
            for row, i in enumerate(chosen):
                ids[row, : len(cut[i])] = cut[i]
            log_p, greedy = _next(self.model(self.params, jnp.asarray(ids)), jnp.asarray(ids))
            values, likely = np.asarray(log_p, np.float64), np.asarray(greedy)
            for row, i in enumerate(chosen):
                span = slice(len(cut[i]) - 1 - len(pairs[i][1]), len(cut[i]) - 1)
                results[i] = float(values[row, span].sum()), bool(likely[row, span].all())
        return results


def limit_of(options: Mapping[str, Any], default: int) -> int:
    """New tokens that a task's generation_kwargs allow; default: where they name no number."""
    return int(next((options[name] for name in LIMITS if options.get(name)), default))


def sampling_of(options: Mapping[str, Any], limit: int) -> SamplingParams:
    """A task's generation_kwargs, read as lm_eval's normalize_gen_kwargs does: a temperature samples unless do_sample
    is false."""
    until = options.get("until") or []
    temperature = 0.0 if options.get("do_sample") is False else float(options.get("temperature") or 0.0)
    return SamplingParams(
        max_new_tokens=limit,
        temperature=temperature,
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
        min_p=float(options.get("min_p") or 0.0),
        repetition_penalty=float(options.get("repetition_penalty") or 1.0),
        stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    )


@jax.jit
def _next(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log probability of the next token, whether it is the most likely one), both [B, S - 1]"""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
    return chosen, log_p.argmax(axis=-1) == ids[:, 1:]


def main() -> None:
    """`lm_eval` with our model in its registry."""
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())


if __name__ == "__main__":
    main()
