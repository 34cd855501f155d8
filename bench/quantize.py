"""Quantizers: quality beside the peers' checkpoints of the same base, and time and memory at Llama-3.1-8B's shape.

    python -m bench.quantize                      quality, on a CPU; needs ../shared/fixtures. --quick: fewer windows
    python -m bench.quantize --internal           GPTQ and AWQ beside rounding on grids that flatter rounding less
    python -m bench.quantize --differences        perplexity to the peers', with the error of the comparison (minutes)
    python -m bench.quantize --shape llama8b      a GPU: --scheme gptq | awq, random weights, 512 x 2048 tokens

Quality is that of the weights alone (activations not quantized), dequantized to float32: perplexity and KL to the base
on 64 windows of 512 tokens of valid.bin, exact match on the 1,000 tasks. Both sides were calibrated on the same 64
rows of 256 ids: evenly spaced ones of the first nine tenths of calib.npy. An hour of two busy cores: rows are written
as they come, and a run that is repeated at the same commit takes those it finds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import record

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
#: (name, the peer's folder or None, options of ours)
PAIRS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("GPTQ 4-bit sym g128", "gptq-4bit-g128", {"scheme": "gptq", "damp": 0.05}),
    ("GPTQ 4-bit sym g128 act-order", "gptq-4bit-g128-desc-act", {"scheme": "gptq", "damp": 0.05, "act_order": True}),
    ("GPTQ 4-bit asym g128", "gptq-4bit-g128-asym-v1", {"scheme": "gptq", "damp": 0.05, "symmetric": False}),
    ("GPTQ 8-bit sym g128", "gptq-8bit-g128", {"scheme": "gptq", "damp": 0.05, "bits": 8}),
    ("AWQ 4-bit g128", "awq-4bit-g128", {"scheme": "awq", "search_tokens": 4096}),
    # Rounded to nearest: byte for byte LLM Compressor's files (tests/quantize/test_bits.py), so one row stands for both
    ("RTN 4-bit asym g128", None, {"scheme": "w4a16", "symmetric": False}),
    ("RTN 4-bit sym g128", None, {"scheme": "w4a16"}),
    ("FP8 per channel", None, {"scheme": "fp8-dynamic"}),
    ("INT8 per channel", None, {"scheme": "w8a8-int8"}),
]
#: Grids that no format here stores: (bits, symmetric, group); 0: a scale a channel. GPTQ, AWQ and rounding compared.
INTERNAL = [(3, False, 128), (4, False, 0), (3, False, 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("llama8b",), help="time and memory instead of quality")
    parser.add_argument("--scheme", choices=("gptq", "awq"), default="gptq")
    parser.add_argument("--layers", type=int, default=2, help="layers measured; the total is for 32")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--scale", type=int, default=1, help="divide the shape's sizes, to try the script on a CPU")
    parser.add_argument("--quick", action="store_true", help="8 windows, 100 tasks")
    parser.add_argument("--internal", action="store_true", help="grids that no format stores: 250 tasks")
    parser.add_argument("--differences", action="store_true", help="of perplexities to the peers', window by window")
    parser.add_argument("--only", help="quality: names that contain this")
    parser.add_argument("--out", help="folder of the result file")
    args = parser.parse_args()
    if args.shape:
        from bench.quantize_shape import measure

        rows = measure(args.scheme, args.layers, args.samples, args.seqlen, args.scale)
        record.write(f"quantize_{args.shape}_{args.scheme}", rows, args.out)
        return
    name = "quantize_quality_internal" if args.internal else "quantize_quality"
    name = "quantize_differences" if args.differences else name
    name = f"{name}_quick" if args.quick else name
    windows, tasks = 8 if args.quick else 64, 100 if args.quick else 250 if args.internal else 1000
    tasks = 0 if args.differences else tasks
    quality = Quality(
        windows, tasks, lambda rows: record.write(name, rows, args.out), record.rows_of_this_commit(name, args.out)
    )
    if args.differences:
        quality.differences(args.only)
    else:
        quality.internal() if args.internal else quality.pairs(args.only)


class Quality:
    """Every checkpoint is dequantized into the base's own tree, so that one compiled program serves all."""

    def __init__(
        self, windows: int, tasks: int, keep: Callable[[list[dict[str, Any]]], Any], known: list[dict[str, Any]]
    ) -> None:
        """keep: called with all rows so far. known: rows of an earlier run, taken as they are."""
        import jax
        import jax.numpy as jnp

        import jqserve
        from jqserve.evaluate.tasks import read_tasks
        from jqserve.server.tokenizer import load_tokenizer

        self.jax, self.jnp, self.jqserve, self.keep = jax, jnp, jqserve, keep
        self.known = {(row["name"], row["maker"]): row for row in known}
        base = FIXTURES / "base-bf16"
        self.model, self.base = jqserve.load(base, dtype="float32")
        ids = np.fromfile(FIXTURES / "valid.bin", "<u2")[: windows * 512]
        self.windows = ids.reshape(windows, 512).astype(np.int32)
        rows = np.load(FIXTURES / "calib.npy").reshape(-1, 256)
        rows = rows[: len(rows) * 9 // 10]
        self.samples = rows[np.linspace(0, len(rows) - 1, 64).round().astype(int)].astype(np.int32)
        every = read_tasks(FIXTURES / "tasks_test.jsonl")
        self.tasks = every[:: max(1, len(every) // tasks)][:tasks] if tasks else []
        self.base_log_p = [np.asarray(_log_p(self.model(self.base, w))) for w in self.cut()]
        self.tokenizer = load_tokenizer(str(base))

    def cut(self) -> list[Any]:
        """The windows, a few at a time."""
        return [self.jnp.asarray(self.windows[i : i + 4]) for i in range(0, len(self.windows), 4)]

    def pairs(self, only: str | None) -> list[dict[str, Any]]:
        rows = [self.row("base", "base", lambda: self.base)]
        for name, peer, flags in PAIRS:
            if only and only not in name:
                continue
            pair: list[dict[str, Any]] = []
            if peer is not None:
                pair.append(self.row(name, f"peer: {peer}", lambda peer=peer: self.dense(FIXTURES / peer)))
            pair.append(self.made(name, "jqserve", flags))
            if len(pair) == 2:
                pair[1]["kl_ratio"] = round(pair[1]["kl"] / pair[0]["kl"], 4)
            rows += pair
            self.keep(rows)
        return rows

    def differences(self, only: str | None) -> None:
        """Ours and the peer's on the same windows: the mean over windows of the difference in nats a token, and its
        standard error, which says what of it is chance."""
        from jqserve.quantize.options import Options

        rows: list[dict[str, Any]] = []
        for name, peer, flags in PAIRS:
            if peer is None or (only and only not in name):
                continue
            theirs, ours = self.nll(self.dense(FIXTURES / peer)), self.nll(self.quantized(Options(**flags))[0])
            difference = ours - theirs
            row = {
                "name": name,
                "peer": peer,
                "perplexities": [round(float(np.exp(nll.mean())), 4) for nll in (theirs, ours)],
                "nats": round(float(difference.mean()), 5),
                "standard_error": round(float(difference.std(ddof=1) / len(difference) ** 0.5), 5),
            }
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            self.keep(rows)

    def nll(self, params: Any) -> np.ndarray:
        """Mean negative log-likelihood of each window, nats a token [windows]."""
        from jqserve.evaluate.likelihood import compared_with

        found = [
            np.asarray(compared_with(log_p, self.model(params, ids), ids)["nll"], np.float64).reshape(len(ids), -1)
            for ids, log_p in zip(self.cut(), self.base_log_p)
        ]
        return np.concatenate(found).mean(axis=1)

    def internal(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for bits, symmetric, group in INTERNAL:
            name = f"{bits}-bit {'sym' if symmetric else 'asym'} {f'g{group}' if group else 'per channel'}"
            of_grid: list[dict[str, Any]] = []
            for algorithm in ("rtn", "gptq", "awq"):
                row = self.made(name, f"jqserve {algorithm}", {}, internal(algorithm, bits, symmetric, group))
                if of_grid:
                    row["kl_over_rtn"] = round(row["kl"] / of_grid[0]["kl"], 4)
                of_grid.append(row)
                self.keep([*rows, *of_grid])
            rows += of_grid
        return rows

    def made(self, name: str, maker: str, flags: dict[str, Any], options: Any = None) -> dict[str, Any]:
        from jqserve.quantize.options import Options

        if (name, maker) in self.known:
            return self.known[name, maker]
        params, seconds = self.quantized(options or Options(**flags))
        return {**self.row(name, maker, lambda: params), "quantize_seconds": round(seconds, 1)}

    def quantized(self, options: Any) -> tuple[Any, float]:
        """The base through our quantizer, dequantized, and the seconds that it took."""
        from jqserve.quantize.job import quantize

        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            quantize(FIXTURES / "base-bf16", Path(folder) / "out", options, self.samples)
            seconds = time.perf_counter() - begin
            return self.dense(Path(folder) / "out"), seconds

    def dense(self, path: Path) -> Any:
        _, params = self.jqserve.load(path, dtype="float32", activations="none", layout="canonical")
        tensor = self.jqserve.QuantizedTensor
        return self.jax.tree.map(
            lambda leaf: self.jqserve.dequantize(leaf) if isinstance(leaf, tensor) else leaf,
            params,
            is_leaf=lambda leaf: isinstance(leaf, tensor),
        )

    def row(self, name: str, maker: str, parameters: Callable[[], Any]) -> dict[str, Any]:
        from jqserve.evaluate.likelihood import compared_with
        from jqserve.evaluate.tasks import ask, score

        if (name, maker) in self.known:
            return self.known[name, maker]
        params = parameters()
        sums = {"nll": 0.0, "kl": 0.0, "agree": 0.0}
        for ids, log_p in zip(self.cut(), self.base_log_p):
            found = compared_with(log_p, self.model(params, ids), ids)
            for key in sums:
                sums[key] += float(np.asarray(found[key], np.float64).sum())
        count = self.windows[:, 1:].size
        row = {
            "name": name,
            "maker": maker,
            "perplexity": round(float(np.exp(sums["nll"] / count)), 4),
            "kl": round(sums["kl"] / count, 6),
            "top1_agreement": round(sums["agree"] / count, 5),
        }
        if self.tasks:
            self.answers = {tuple(ask(self.tokenizer, task.prompt)): task.answer for task in self.tasks}
            scores = score(self.model, params, self.tokenizer, self.tasks, self.greedy(params))
            row["task_accuracy"] = round(scores.accuracy, 4)
        print(row, file=sys.stderr, flush=True)
        return row

    def greedy(self, params: Any) -> Callable[[Sequence[Sequence[int]], Sequence[int]], list[str]]:
        """Generation that computes whole sequences again for each token: slow, but one program serves every
        checkpoint. A sequence ends when its text no longer is the beginning of the answer."""

        def generate(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
            texts: list[str] = []
            for begin in range(0, len(prompts), 64):
                texts += self.batch(params, prompts[begin : begin + 64], limits[begin : begin + 64])
            return texts

        return generate

    def batch(self, params: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        width = -(-max(len(p) + n for p, n in zip(prompts, limits)) // 32) * 32
        ids = np.zeros((64, width), np.int32)
        at = np.array([len(p) for p in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        ends, going = set(self.model.config.eos_token_ids), np.ones(len(prompts), bool)
        for _ in range(max(limits)):
            best = np.asarray(self.jnp.argmax(self.model(params, self.jnp.asarray(ids)), axis=-1))
            for row in np.flatnonzero(going).tolist():
                token = int(best[row, at[row] - 1])
                going[row] = token not in ends and at[row] + 1 - len(prompts[row]) < limits[row]
                if token not in ends:
                    ids[row, at[row]] = token
                    at[row] += 1
                    text = self.tokenizer.decode(ids[row, len(prompts[row]) : at[row]].tolist())
                    going[row] &= self.answers[tuple(prompts[row])].startswith(text.strip())
            if not going.any():
                break
        return [self.tokenizer.decode(ids[row, len(p) : at[row]].tolist()) for row, p in enumerate(prompts)]


def _log_p(logits: Any) -> Any:
    from jqserve.evaluate.likelihood import log_probabilities

    return log_probabilities(logits)


def internal(algorithm: str, bits: int, symmetric: bool, group: int) -> Any:
    """Options whose output is the dequantized weight in float32: grids that no format stores can be looked at too."""
    from jqserve.quantize.grid import Grid
    from jqserve.quantize.options import Options

    class Dequantized:
        name, dtype = "dense", "float32"

        def tensors(self, codes: Any, inputs: Any) -> dict[str, np.ndarray]:
            return {"weight": codes.dequantize()}

        def config(self, facts: Any) -> Any:
            return None

        def files(self, facts: Any) -> dict[str, Any]:
            return {}

    @dataclasses.dataclass(frozen=True)
    class Internal(Options):
        def grid(self, model_dtype: str) -> Grid:
            return Grid("int", bits, symmetric, (1, group), "float16")

        def writer(self) -> Any:
            return Dequantized()

    scheme = {"rtn": "w4a16", "gptq": "gptq", "awq": "awq"}[algorithm]
    return Internal(scheme, damp=0.05, search_tokens=4096)


if __name__ == "__main__":
    main()
