"""`jqserve convert`: a Hugging Face checkpoint -> Orbax arrays and a checked manifest, which serving loads as well."""

from __future__ import annotations

import argparse
import shlex

from jqserve.cli.scheme_flags import add_scheme_flags, quantization_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jqserve convert`."""
    parser.add_argument("--model-path", required=True, metavar="DIR|HUB_ID", help="the checkpoint to read")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write: new, or empty")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--dtype", default="auto", help="of dense weights: auto, bfloat16, float16, float32")
    add_scheme_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Converts, then prints the plan. Reads and writes layer by layer; needs no GPU."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from jqserve.checkpoint import store
    from jqserve.checkpoint.hub import resolve
    from jqserve.cli.plan import show
    from jqserve.engine.calibrated import open_asked

    directory = resolve(args.model_path, args.revision)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def progress(done: int, total: int, path: str) -> None:
            bar.update(task, completed=done, total=total, description=path)

        source, quantization = open_asked(directory, quantization_of(args), args.calibration, progress=progress)
        plan = store.convert(source, args.out, dtype=args.dtype, quantization=quantization, progress=progress)
    console = show(plan)
    console.print(
        f"{args.out}: written; serve it with `jqserve-server --model-path {shlex.quote(str(args.out))}`", soft_wrap=True
    )
    return 0
