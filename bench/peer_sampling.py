"""Top-k and top-p by a sort, in torch, as vLLM's sampler does it where FlashInfer is absent.

Run by bench/sampling.py under a Python that has torch; JSON lines on stdout. Times are of a CUDA graph's replay, which
has the launches in it. Temperature, sort, the cuts in sorted order, back to the tokens' order, softmax, and a draw by
dividing the probabilities by exponential noise.
"""

from __future__ import annotations

import argparse
import json

import torch

from bench.torch_graph import graph_microseconds

CALLS = 4
ASKED = {"top-p": (0.6, None, 0.9), "top-k+top-p": (0.7, 20, 0.8)}


def draw(logits: torch.Tensor, temperature: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor) -> torch.Tensor:
    ordered, index = torch.div(logits, temperature).sort(dim=-1, descending=False)
    if k is not None:
        least = ordered.gather(1, (ordered.shape[1] - k).unsqueeze(1))
        ordered = ordered.masked_fill(ordered < least, -float("inf"))
    below = ordered.softmax(dim=-1).cumsum(dim=-1)
    cut = below <= 1 - p
    cut[:, -1] = False
    kept = ordered.masked_fill(cut, -float("inf"))
    probabilities = torch.empty_like(kept).scatter_(1, index, kept).softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--vocabulary", type=int, default=128256)
    args = parser.parse_args()
    for rows in map(int, args.rows.split(",")):
        logits = torch.randn(rows, args.vocabulary, device="cuda") * 2.5
        for name, (t, k, p) in ASKED.items():
            temperature, top_p = (torch.full((rows, 1), value, device="cuda") for value in (t, p))
            top_k = None if k is None else torch.full((rows,), k, device="cuda", dtype=torch.long)
            us = graph_microseconds(lambda a=(logits, temperature, top_k, top_p): draw(*a), CALLS)
            print(json.dumps({"rows": rows, "way": f"{name} torch", "us": round(us, 2), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
