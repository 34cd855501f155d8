"""`jqserve quantize`: a dense checkpoint in, a quantized one in a standard format out; layer by layer, resumable."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

#: Calibration rows.
SAMPLES = 512
#: Tokens a calibration row, where the model has as many positions.
SEQLEN = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from jqserve.quantize.schemes import SCHEMES

    width = max(map(len, SCHEMES))
    table = [f"  {name:<{width}}  {row.summary}; --format {' | '.join(row.formats)}" for name, row in SCHEMES.items()]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "schemes:\n" + "\n".join(table)
    add = parser.add_argument
    add("--model-path", required=True, metavar="DIR|HUB_ID", help="the unquantized checkpoint")
    add("--revision", help="of a Hub id")
    add(
        "--out", required=True, metavar="DIR", help="the directory to write: new, or empty; it appears when all is done"
    )
    add("--scheme", required=True, metavar="S", help="what to make, see below")
    add("--format", help="how to write it; default: the first one of the scheme")
    add("--calibration", metavar="FILE|DIR", help=".txt, .jsonl (text, or messages), .npy of token ids, or a directory")
    add("--samples", type=int, help="calibration rows (default 512)")
    add("--seqlen", type=int, help="tokens a calibration row (default 2048, or all of the model's positions)")
    add("--seed", type=int, help="draw the calibration rows instead of taking evenly spaced ones")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="leave a Linear dense: its name, or re:REGEX")
    add("--bits", type=int, help="gptq: 4 or 8")
    add("--group-size", type=int, help="values along the input that share a scale; -1: all")
    signs = parser.add_mutually_exclusive_group()
    signs.add_argument("--sym", dest="symmetric", action="store_true", default=None, help="without zero points")
    signs.add_argument("--asym", dest="symmetric", action="store_false", help="with zero points")
    add(
        "--act-order",
        action="store_true",
        help="gptq: columns with large inputs first (compressed-tensors: --static-groups)",
    )
    add("--static-groups", action="store_true", help="with --act-order: groups keep their columns, fast to serve")
    add("--damp", type=float, help="gptq: share of the Hessian's mean added to its diagonal (0.01)")
    add("--gptq", action="store_true", help="w8a8-int8: GPTQ instead of rounding to nearest")
    add("--smoothquant", type=float, nargs="?", const=0.5, metavar="ALPHA", help="w8a8-int8: SmoothQuant (0.5)")
    add("--no-clip", action="store_true", help="awq: without the search for clipped ranges")
    add("--search-tokens", type=int, help="awq: tokens by which a scale is judged (65536)")
    add("--kv-cache", choices=("none", "fp8"), default="none", help="fp8: also calibrate scales of the KV cache")
    add(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of calibration activations"
    )
    add("--chunk-tokens", type=int, help="tokens on the device at a time (16384)")
    add("--restart", action="store_true", help="throw away an unfinished run with other options")


def run(args: argparse.Namespace) -> int:
    """Prints a line a layer, then what came out."""
    from jqserve.errors import RequestError
    from jqserve.quantize.options import CHUNK_TOKENS, Options

    options = Options(
        scheme=args.scheme,
        format=args.format,
        bits=args.bits,
        group_size=args.group_size,
        symmetric=args.symmetric,
        act_order=args.act_order,
        static_groups=args.static_groups,
        damp=Options.damp if args.damp is None else args.damp,
        gptq=args.gptq,
        smoothquant=args.smoothquant,
        search_tokens=Options.search_tokens if args.search_tokens is None else args.search_tokens,
        clip=not args.no_clip,
        kv_cache=args.kv_cache,
        ignore=tuple(args.ignore),
    )
    if args.chunk_tokens is not None and args.chunk_tokens < 1:
        raise RequestError("--chunk-tokens", f"must be at least 1, found {args.chunk_tokens}")
    from jqserve.checkpoint.hub import resolve
    from jqserve.quantize.job import quantize

    source = resolve(args.model_path, args.revision)
    for flag, given, algorithm in (
        ("--damp", args.damp is not None, "gptq"),
        ("--no-clip", args.no_clip, "awq"),
        ("--search-tokens", args.search_tokens is not None, "awq"),
    ):
        if given and options.algorithm != algorithm:
            raise RequestError(flag, f"belongs to {algorithm.upper()}, which --scheme {args.scheme} does not run here")
    if not options.calibrated:
        about_data = {
            "--calibration": args.calibration is not None,
            "--samples": args.samples is not None,
            "--seqlen": args.seqlen is not None,
            "--seed": args.seed is not None,
            "--dtype": args.dtype != "auto",
            "--chunk-tokens": args.chunk_tokens is not None,
        }
        for flag in (flag for flag, given in about_data.items() if given):
            raise RequestError(flag, f"--scheme {args.scheme} as asked for here takes no data; leave it out")
    rows_asked = SAMPLES if args.samples is None else args.samples
    samples = _samples(args, source, rows_asked) if args.calibration else None
    if samples is not None:
        fewer = f" (--samples asks for {rows_asked}; there is no more text)" if len(samples) < rows_asked else ""
        print(f"calibrating on {len(samples)} rows of {samples.shape[1]} tokens{fewer}", flush=True)
    if options.written == "gptq" and not options.grid("float16").symmetric:
        print(
            "note: GPTQModel, and transformers with it, load zero points in version 1 only from files of their own "
            "making; --format gptq_v2 is what they take",
            flush=True,
        )
    with _Screen() as screen:
        rows = quantize(
            source,
            args.out,
            options,
            samples,
            dtype=None if args.dtype == "auto" else args.dtype,
            chunk_tokens=CHUNK_TOKENS if args.chunk_tokens is None else args.chunk_tokens,
            restart=args.restart,
            progress=screen.layer,
        )
    size = sum(path.stat().st_size for path in Path(args.out).glob("*.safetensors"))
    print(f"{args.out}: {len(rows)} Linears quantized, {size / 2**20:,.1f} MiB of weights")
    made, base = shlex.quote(str(args.out)), shlex.quote(str(args.model_path))
    print(f"compare: jqserve eval --model-path {made} --base {base} --text FILE")
    print(f"serve:   jqserve-server --model-path {made}")
    return 0


def _samples(args: argparse.Namespace, source: Any, rows: int) -> Any:
    from jqserve.checkpoint.hf import Checkpoint
    from jqserve.checkpoint.opening import read_configs
    from jqserve.errors import RequestError
    from jqserve.quantize.calibration import read_calibration
    from jqserve.server.tokenizer import load_tokenizer

    with Checkpoint(source, weights=False) as checkpoint:
        config, _ = read_configs(checkpoint, "auto")
    if args.seqlen is not None and args.seqlen > config.max_position:
        raise RequestError("--seqlen", f"{args.seqlen} is more than the model's {config.max_position} positions")
    seqlen = min(SEQLEN, config.max_position) if args.seqlen is None else args.seqlen
    end = config.eos_token_ids[0] if config.eos_token_ids else None
    return read_calibration(
        Path(args.calibration), rows, seqlen, config.vocab_size, lambda: load_tokenizer(str(source)), end,
        args.seed,
    )  # fmt: skip


class _Screen:
    """A line a layer on stdout, a bar on stderr where that is a terminal."""

    def __enter__(self) -> _Screen:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("layers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar.start()
        self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def layer(self, done: int, total: int, rows: tuple[Any, ...], kept: bool) -> None:
        self._bar.update(self._task, completed=done, total=total)
        cells = []
        for row in rows:
            decibels = row.weight_db if row.output_db is None else row.output_db
            cells.append(f"{row.name.rpartition('.')[2].removesuffix('_proj')} {decibels:.1f}")
        print(f"layer {done - 1}: signal to error in dB: {'  '.join(cells)}{'  (kept)' if kept else ''}", flush=True)
        for row in rows:
            if row.note:
                print(f"  {row.name}: {row.note}", flush=True)
