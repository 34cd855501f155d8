"""`jqserve logits`: the logits of given token ids, and what greedy decoding adds, in an .npz: how two engines compare.

IN.npz   arrays p0, p1, ...: int [S] token ids
OUT.npz  the same names: float32 [S, V]; with --greedy N also p0_greedy, ...: int32 [N]
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from jqserve.cli.scheme_flags import add_scheme_flags, quantization_of
from jqserve.errors import RequestError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model-path", required=True, metavar="DIR", help="checkpoint directory, or a Hub id from the local cache")
    add("--revision", help="of a Hub id")
    add("--input-ids", required=True, metavar="IN.npz", help="arrays p0, p1, ...: int32 [S] token ids")
    add("--out", required=True, metavar="OUT.npz", help="the same names: float32 [S, V]")
    add("--dtype", choices=DTYPES, default="auto", help="of activations and unquantized weights (auto: the model's)")
    add("--greedy", type=int, default=0, metavar="N", help="also N greedy tokens after each prompt: pI_greedy")
    add("--activations", choices=("config", "none"), default="config", help="none: leave activations unquantized")
    add_scheme_flags(parser)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(Path(args.input_ids))
    if args.greedy < 0:
        raise RequestError("--greedy", f"must be 0 or more, found {args.greedy}")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise RequestError("--out", f"{out.parent} is not a directory")
    if out.is_dir():
        raise RequestError("--out", f"{out} is a directory; give the file to write in it")

    from jqserve import library  # imports jax: after the cheap checks

    model, params = library.load(
        args.model_path,
        dtype=None if args.dtype == "auto" else args.dtype,
        quantization=quantization_of(args),
        calibration=args.calibration,
        activations=args.activations,
        revision=args.revision,
    )
    check_prompts(prompts, model.config.vocab_size, model.config.max_position, args.greedy)
    results: dict[str, np.ndarray] = {}
    for name, tokens in prompts.items():
        results[name] = library.logits(model, params, tokens)
        if args.greedy:
            results[f"{name}_greedy"] = library.greedy(model, params, tokens, args.greedy)
        print(f"{name}: {len(tokens)} tokens", flush=True)
    write(out, results)
    print(f"wrote {out}")
    return 0


def read_prompts(path: Path) -> dict[str, np.ndarray]:
    """p0, p1, ... in numeric order. Raises RequestError that names the array at fault."""
    if not path.is_file():
        raise RequestError("--input-ids", f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise RequestError("--input-ids", f"{path} is not an .npz of plain arrays: {error}") from None
    if not arrays:
        raise RequestError("--input-ids", f"{path} holds no arrays; expected p0, p1, ...: int32 [S]")
    for name, array in arrays.items():
        found = f"found {array.dtype} {list(array.shape)}"
        if not re.fullmatch(r"p\d+", name):
            raise RequestError("--input-ids", f"{path}: unknown array {name!r}; expected names p0, p1, ...")
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise RequestError("--input-ids", f"{path}: {name} must be int32 [S] with S >= 1, {found}")
    return {name: arrays[name] for name in sorted(arrays, key=lambda name: int(name[1:]))}


def check_prompts(prompts: dict[str, np.ndarray], vocab_size: int, max_position: int, more: int) -> None:
    """Raises RequestError for ids outside the vocabulary and for more positions than the model has."""
    for name, tokens in prompts.items():
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            bad = int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])
            raise RequestError("--input-ids", f"{name} holds token id {bad}; the model has 0..{vocab_size - 1}")
        if len(tokens) + more > max_position:
            raise RequestError(
                "--input-ids", f"{name} needs {len(tokens)} + {more} positions; the model has {max_position}"
            )


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All or nothing: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
