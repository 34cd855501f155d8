"""Many completions at once without a server: continuous batching, sampling, log-probabilities, a progress bar.

python examples/generate_offline.py [--model-path DIR] [--max-new-tokens N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jqserve

DEMO = Path(jqserve.__file__).parent / "demo" / "model"
PROMPTS = ["The configuration file", "To install the package,", "If the server does not start,", "def main():"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(DEMO))
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()

    engine = jqserve.Engine(args.model_path)
    greedy = jqserve.SamplingParams(temperature=0.0, max_new_tokens=args.max_new_tokens)
    # The same seed gives the same text, alone or in a batch.
    seeded = jqserve.SamplingParams(temperature=0.8, top_p=0.95, seed=7, logprobs=0, max_new_tokens=args.max_new_tokens)

    started = time.perf_counter()
    completions = engine.generate(PROMPTS + PROMPTS, [greedy] * len(PROMPTS) + [seeded] * len(PROMPTS))
    seconds = time.perf_counter() - started

    for prompt, completion in zip(PROMPTS + PROMPTS, completions):
        print(f"{prompt}|{completion.text}")
    tokens = sum(len(c.token_ids) for c in completions)
    print(f"{tokens} tokens in {seconds:.1f} s, compilation included")
    surest = max(
        completions[len(PROMPTS) :], key=lambda c: sum(step.token for step in c.logprobs) / max(1, len(c.logprobs))
    )
    print(f"the sampled text the model found likeliest: {surest.text!r}")


if __name__ == "__main__":
    try:
        main()
    except (jqserve.JqserveError, OSError) as error:  # what the reader can mend
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
