"""What each online scheme costs in quality: perplexity, KL to the unquantized model, accuracy of checkable tasks.

    python -m bench.online_schemes --model-path DIR --text valid.bin --tasks tasks_test.jsonl --out DIR

valid.bin holds uint16 token ids; tasks are JSON lines {prompt, answer}, judged as `jqserve eval` does. Everything runs
through the layers that serve, in float32 unless --dtype says otherwise; awq and gptq are calibrated on the built-in
text. Of the tasks it is noted how many the scheme loses that the base has right and the other way round, for the two
rates alone do not say what is chance. Windows are the first ones of the text, as in bench/quantize.py. The file is
written anew after every scheme.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import record
from jqserve import library
from jqserve.checkpoint.asked import CALIBRATED
from jqserve.checkpoint.online import ONLINE, TORCHAO
from jqserve.evaluate.tasks import read_tasks, score
from jqserve.server.tokenizer import load_tokenizer

SCHEMES = ("none", *ONLINE, *(f"torchao:{name}" for name in TORCHAO), *CALIBRATED)
BATCH, PAD = 64, 16


def windows(path: Path, count: int, size: int) -> np.ndarray:
    """int32 [count, size]"""
    return np.fromfile(path, np.uint16)[: count * size].astype(np.int32).reshape(count, size)


def log_probabilities(model: library.Model, params: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [S, V]"""
    return np.asarray(jax.nn.log_softmax(model(params, jnp.asarray(tokens)), axis=-1))


def quality(model: library.Model, params: Any, text: np.ndarray, base: list[np.ndarray] | None) -> dict[str, Any]:
    """Perplexity over the windows and, against `base`'s log probabilities, the mean KL in nats and top-1 agreement."""
    loss, kl, same, found = [], [], [], []
    for i, row in enumerate(text):
        got = log_probabilities(model, params, row)
        loss.append(-got[np.arange(len(row) - 1), row[1:]].mean())
        if base is None:
            found.append(got)
        else:
            kl.append((np.exp(base[i]) * (base[i] - got)).sum(-1).mean())
            same.append((base[i].argmax(-1) == got.argmax(-1)).mean())
    result: dict[str, Any] = {"perplexity": float(np.exp(np.mean(loss))), "kl": 0.0, "top1_agree": 1.0}
    if base is not None:
        result |= {"kl": float(np.mean(kl)), "top1_agree": float(np.mean(same))}
    return result | {"base": found}


def generator(model: library.Model, params: Any, tokenizer: Any) -> Any:
    """What `jqserve.evaluate.tasks.score` asks for answers that are not right at first sight: whole sequences are
    computed again for each token, so that few shapes compile."""
    stops = list(model.config.eos_token_ids)

    @jax.jit
    def step(params: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(params, tokens)
        chosen = jnp.argmax(jnp.take_along_axis(logits, at[:, None, None] - 1, axis=1)[:, 0], -1).astype(jnp.int32)
        return tokens.at[jnp.arange(len(at)), at].set(chosen), at + 1

    def batch(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        length = -(-max(len(p) + n for p, n in zip(prompts, limits)) // PAD) * PAD
        tokens, starts = np.zeros((BATCH, length), np.int32), np.ones(BATCH, np.int32)
        for i, ids in enumerate(prompts):
            tokens[i, : len(ids)], starts[i] = ids, len(ids)
        grown, at = jnp.asarray(tokens), jnp.asarray(starts)
        ended = np.arange(BATCH) >= len(prompts)
        for _ in range(max(limits)):
            grown, at = step(params, grown, at)
            ended |= np.isin(np.asarray(grown)[np.arange(BATCH), np.asarray(at) - 1], stops)
            if ended.all():
                break
        texts = []
        for i, limit in enumerate(limits):
            said = np.asarray(grown)[i, starts[i] : starts[i] + limit].tolist()
            end = next((n for n, token in enumerate(said) if token in stops), len(said))
            texts.append(tokenizer.decode(said[:end], skip_special_tokens=True))
        return texts

    def generate(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        texts: list[str] = []
        for i in range(0, len(prompts), BATCH):
            texts += batch(prompts[i : i + BATCH], limits[i : i + BATCH])
        return texts

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", type=Path, required=True)
    add("--text", type=Path, required=True)
    add("--tasks", type=Path, required=True)
    add("--schemes", nargs="+", default=list(SCHEMES))
    add("--windows", type=int, default=64)
    add("--window", type=int, default=512)
    add("--limit", type=int, default=1000, help="tasks; 0: only the text")
    add("--dtype", default="float32")
    add("--name", default="online_schemes")
    add("--out", help="default: bench/results")
    args = parser.parse_args()
    text = windows(args.text, args.windows, args.window)
    tasks = read_tasks(args.tasks, args.limit) if args.limit else []
    tokenizer = load_tokenizer(str(args.model_path))
    rows: list[dict[str, Any]] = []
    base: list[np.ndarray] | None = None
    of_base: tuple[bool, ...] = ()
    for scheme in dict.fromkeys(("none", *args.schemes)):
        model, params = library.load(args.model_path, dtype=args.dtype, quantization=scheme)
        measured = quality(model, params, text, base)
        base = base or measured["base"]
        del measured["base"]
        row = {"scheme": scheme, **measured}
        if tasks:
            generate = generator(model, params, tokenizer)
            scores = score(model, params, tokenizer, tasks, generate)
            of_base = of_base or scores.right
            row["task_accuracy"] = scores.accuracy
            row["task_recovery"] = scores.accuracy / (rows[0]["task_accuracy"] if rows else scores.accuracy)
            row["tasks_lost"] = sum(was and not now for was, now in zip(of_base, scores.right))
            row["tasks_won"] = sum(now and not was for was, now in zip(of_base, scores.right))
        rows.append(row | {"weight_bytes": sum(r.bytes for r in model.plan.rows)})
        print(json.dumps(rows[-1]), flush=True)
        record.write(args.name, rows, args.out, windows=args.windows, window=args.window, tasks=len(tasks))


if __name__ == "__main__":
    main()
