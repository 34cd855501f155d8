"""What each online scheme costs in quality: perplexity, KL to the unquantized model, accuracy of checkable tasks.

    python -m bench.online_schemes --model-path DIR --text valid.bin --tasks tasks_test.jsonl --out DIR

valid.bin holds uint16 token ids; tasks are JSON lines {prompt, answer}, asked through the chat template, answered
greedily, compared exactly. Everything runs through the same layers that serve,
in float32 unless --dtype says otherwise. The file is written anew after every scheme.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import record
from jqserve import library
from jqserve.checkpoint.online import ONLINE, TORCHAO
from jqserve.server.tokenizer import load_tokenizer

SCHEMES = ("none", *ONLINE, *(f"torchao:{name}" for name in TORCHAO))
ANSWER_TOKENS, BATCH, PAD = 64, 50, 16


def windows(path: Path, count: int, size: int) -> np.ndarray:
    """int32 [count, size], evenly spaced."""
    ids = np.fromfile(path, np.uint16).astype(np.int32)
    starts = np.linspace(0, len(ids) - size, count).astype(int)
    return np.stack([ids[start : start + size] for start in starts])


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


def prompts(path: Path, model_path: Path, limit: int) -> list[tuple[list[int], str]]:
    tokenizer = load_tokenizer(str(model_path))
    rows = [json.loads(line) for line in path.read_text().splitlines()[:limit]]
    template = tokenizer.need_chat()
    texts = [template.render([{"role": "user", "content": row["prompt"]}]) for row in rows]
    return [(tokenizer.encode(text, add_special_tokens=False), row["answer"]) for text, row in zip(texts, rows)]


def batches(tasks: list[tuple[list[int], str]]) -> Iterator[list[tuple[list[int], str]]]:
    """Of like lengths, so that few shapes compile."""
    ordered = sorted(tasks, key=lambda task: len(task[0]))
    for i in range(0, len(ordered), BATCH):
        yield ordered[i : i + BATCH]


def accuracy(model: library.Model, params: Any, model_path: Path, tasks: list[tuple[list[int], str]]) -> float:
    """The share of tasks whose greedy answer, up to EOS, is the expected text."""
    tokenizer, right = load_tokenizer(str(model_path)), 0
    stops = set(model.config.eos_token_ids)

    @jax.jit
    def step(params: Any, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(params, tokens)
        chosen = jnp.argmax(jnp.take_along_axis(logits, at[:, None, None] - 1, axis=1)[:, 0], -1).astype(jnp.int32)
        return tokens.at[jnp.arange(len(at)), at].set(chosen), at + 1

    for batch in batches(tasks):
        length = -(-(max(len(ids) for ids, _ in batch) + ANSWER_TOKENS) // PAD) * PAD
        tokens = np.zeros((BATCH, length), np.int32)
        starts = np.ones(BATCH, np.int32)
        for i, (ids, _) in enumerate(batch):
            tokens[i, : len(ids)], starts[i] = ids, len(ids)
        grown, at = jnp.asarray(tokens), jnp.asarray(starts)
        ended = np.arange(BATCH) >= len(batch)
        while not ended.all() and int(at[0]) < starts[0] + ANSWER_TOKENS:
            grown, at = step(params, grown, at)
            ended |= np.isin(np.asarray(grown)[np.arange(BATCH), np.asarray(at) - 1], list(stops))
        for i, (_, answer) in enumerate(batch):
            said = np.asarray(grown)[i, starts[i] : starts[i] + ANSWER_TOKENS].tolist()
            end = next((n for n, token in enumerate(said) if token in stops), len(said))
            right += tokenizer.decode(said[:end], skip_special_tokens=True).strip() == answer.strip()
    return right / len(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", type=Path, required=True)
    add("--text", type=Path, required=True)
    add("--tasks", type=Path, required=True)
    add("--schemes", nargs="+", default=list(SCHEMES))
    add("--windows", type=int, default=16)
    add("--window", type=int, default=512)
    add("--limit", type=int, default=1000, help="tasks; 0: only the text")
    add("--dtype", default="float32")
    add("--name", default="online_schemes")
    add("--out", help="default: bench/results")
    args = parser.parse_args()
    text = windows(args.text, args.windows, args.window)
    tasks = prompts(args.tasks, args.model_path, args.limit)
    rows: list[dict[str, Any]] = []
    base: list[np.ndarray] | None = None
    for scheme in dict.fromkeys(("none", *args.schemes)):
        model, params = library.load(args.model_path, dtype=args.dtype, quantization=scheme)
        measured = quality(model, params, text, base)
        base = base or measured["base"]
        del measured["base"]
        row = {"scheme": scheme, **measured}
        if tasks:
            row["task_accuracy"] = accuracy(model, params, args.model_path, tasks)
            row["task_recovery"] = row["task_accuracy"] / rows[0]["task_accuracy"] if rows else 1.0
        rows.append(row | {"weight_bytes": sum(r.bytes for r in model.plan.rows)})
        print(json.dumps(rows[-1]), flush=True)
        record.write(args.name, rows, args.out, windows=args.windows, window=args.window, tasks=len(tasks))


if __name__ == "__main__":
    main()
