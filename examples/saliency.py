"""Which tokens of a prompt move the model's answer? Gradients through packed 4-bit weights, with jit and vmap.

    python examples/saliency.py [--model-path DIR] [--text "..."]

The gradient of the winning next-token logit with respect to each input embedding, times that embedding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

import jqserve

DEMO = Path(jqserve.__file__).parent / "demo" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(DEMO))
    parser.add_argument("--text", default="To install the package, run pip install and then")
    args = parser.parse_args()

    model, params = jqserve.load(args.model_path, dtype="float32")
    file = Path(args.model_path) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; this example takes a directory that has it")
    tokenizer = Tokenizer.from_file(str(file))
    tokens = jnp.array(tokenizer.encode(args.text).ids)

    @jax.jit
    def contributions(embeddings: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[S, D] -> (the winner's id, [S] gradient x input)"""
        winner = jnp.argmax(model.from_embeddings(params, embeddings)[-1])
        gradient = jax.grad(lambda e: model.from_embeddings(params, e)[-1, winner])(embeddings)
        return winner, (gradient * embeddings).sum(-1)

    embeddings = model.embeddings(params, tokens)
    winner, scores = contributions(embeddings)
    print(f"{args.text!r} goes on with {tokenizer.decode([int(winner)])!r}; each token's part in that logit:")
    for token, score in zip(tokens.tolist(), scores.tolist()):
        print(f"  {score:+8.3f}  {'#' * min(40, round(abs(score) * 4))} {tokenizer.decode([token])!r}")

    # vmap: the answer for the prompt with each token in turn blanked out, in one call.
    blanked = jax.vmap(lambda i: embeddings.at[i].set(0.0))(jnp.arange(len(tokens)))
    logits = jax.jit(jax.vmap(lambda e: model.from_embeddings(params, e)[-1, winner]))(blanked)
    print("the same logit with one token blanked:", " ".join(f"{x:.2f}" for x in logits.tolist()))


if __name__ == "__main__":
    try:
        main()
    except (jqserve.JqserveError, OSError) as error:  # what the reader can mend
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
