"""What is in a quantized checkpoint: the load plan, one packed weight, and how far it is from another checkpoint's.

python examples/inside_weights.py [--model-path DIR] [--compare-with DIR]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp

import jqserve

DEMO = Path(jqserve.__file__).parent / "demo" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(DEMO))
    parser.add_argument("--compare-with", help="another checkpoint of the same model, for example the unquantized one")
    args = parser.parse_args()

    # "canonical" keeps the documented packing; the default would rearrange the arrays for this machine's kernels.
    model, params = jqserve.load(args.model_path, dtype="float32", layout="canonical")
    print(model.plan.to_text())

    weight = params["layers"]["0"]["mlp"]["down"]["weight"]
    if isinstance(weight, jqserve.QuantizedTensor):
        n, k = weight.shape
        print(f"layers.0.mlp.down: {n} x {k}, {weight.spec.qtype}, groups of {weight.spec.group_shape}")
        print(
            f"  packed    {weight.qvalue.dtype} {weight.qvalue.shape}, scales {weight.scale.dtype} {weight.scale.shape}"
        )
        print(f"  {8 * weight.nbytes / (n * k):.3f} bits a weight, scales and zeros included")
    matrix = jqserve.dequantize(weight)
    print(f"  values    {matrix.shape}, standard deviation {float(matrix.std()):.4f}")

    if args.compare_with:
        _, others = jqserve.load(args.compare_with, dtype="float32", layout="canonical")
        print("relative error of each down projection, |W - W'| / |W'|:")
        for i in range(model.config.layers):
            ours, theirs = (jqserve.dequantize(p["layers"][str(i)]["mlp"]["down"]["weight"]) for p in (params, others))
            error = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
            print(f"  layer {i}: {float(error):.4f}")


if __name__ == "__main__":
    try:
        main()
    except (jqserve.JqserveError, OSError) as error:  # what the reader can mend
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
