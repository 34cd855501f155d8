"""`jqserve generate`: completes prompts offline with the whole engine, a progress bar on stderr meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jqserve.cli.scheme_flags import add_scheme_flags, quantization_of
from jqserve.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model-path", required=True, metavar="DIR", help="checkpoint directory, or a Hub id from the local cache")
    add("--revision", help="of a Hub id")
    add("--tokenizer-path", metavar="DIR", help="where the tokenizer is, if not beside the model")
    add("--prompt", action="append", default=[], help="a prompt; may be given several times")
    add("--prompts-file", metavar="FILE", help="one prompt a line, or with .jsonl one object with a 'prompt' a line")
    add("--max-new-tokens", type=int, default=64)
    add("--temperature", type=float, help="0 is greedy; default: what the checkpoint's generation_config.json says")
    add("--top-p", type=float)
    add("--top-k", type=int)
    add("--seed", type=int, help="of the first prompt; the next ones count on from it")
    add("--stop", action="append", default=[], help="a string that ends the text; may be given several times")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add_scheme_flags(parser)
    add("--json", action="store_true", help="one JSON object a line instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints each prompt and what follows it, in order."""
    prompts = args.prompt + (read_prompts(Path(args.prompts_file)) if args.prompts_file else [])
    if not prompts:
        raise RequestError("--prompt", "no prompt; give --prompt TEXT or --prompts-file FILE")
    import dataclasses

    from jqserve.engine.request import SamplingParams
    from jqserve.engine.validate import Limits, check_sampling

    asked = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    asked |= {"max_new_tokens": args.max_new_tokens, "stop": tuple(args.stop)}
    for seed in {args.seed, None if args.seed is None else args.seed + len(prompts) - 1}:
        check_sampling(SamplingParams(seed=seed, **asked), Limits(2**31, 2**31))  # loading may take minutes

    from jqserve.engine.api import Engine

    engine = Engine(
        args.model_path,
        tokenizer_path=args.tokenizer_path,
        revision=args.revision,
        dtype=None if args.dtype == "auto" else args.dtype,
        quantization=quantization_of(args),
        calibration=args.calibration,
    )
    sampling = dataclasses.replace(engine.default_sampling, **asked)
    seeds = [None if args.seed is None else args.seed + i for i in range(len(prompts))]
    completions = engine.generate(prompts, [dataclasses.replace(sampling, seed=seed) for seed in seeds])
    for prompt, done in zip(prompts, completions):
        if args.json:
            row = {
                "prompt": prompt,
                "text": done.text,
                "tokens": len(done.token_ids),
                "finish": done.finish.name.lower(),
            }
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(f"{prompt}{done.text}\n---")
    print(f"{sum(len(c.token_ids) for c in completions)} tokens for {len(prompts)} prompts", file=sys.stderr)
    return 0


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text or .jsonl file. Raises RequestError that names the line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise RequestError("--prompts-file", f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError("--prompts-file", f"{path} is not UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError("--prompts-file", f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise RequestError("--prompts-file", f"{path}, line {number} must be an object with a string 'prompt'")
        prompts.append(row["prompt"])
    return prompts
