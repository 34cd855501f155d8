"""`jqserve eval`: what a quantized checkpoint is worth, next to its base: a table, JSON, an HTML page, a verdict."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model-path", required=True, metavar="DIR|HUB_ID", help="the checkpoint to judge")
    add("--base", metavar="DIR|HUB_ID", help="the unquantized model that it was made from")
    add("--text", metavar="FILE", help="text, .npy of token ids, or .bin of uint16 ids: perplexity, KL, agreement")
    add("--windows", type=int, default=64, help="windows of the text (default 64)")
    add("--seqlen", type=int, default=512, help="tokens of a window (default 512)")
    add("--tasks", metavar="FILE.jsonl", help='a {"prompt", "answer"} a line, perhaps a "kind": exact match')
    add("--limit", type=int, help="only the first tasks")
    add("--no-layers", action="store_true", help="without errors by layer")
    add("--no-speed", action="store_true", help="without measuring speed (never measured without a GPU)")
    add(
        "--min-recovery", type=float, default=0.98, metavar="SHARE", help="below it the exit status is 3 (default 0.98)"
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--activations", choices=("config", "none"), default="config", help="none: look at the weights alone")
    add("--json", metavar="FILE", help="write the result as JSON ('-': to the terminal, instead of the table)")
    add("--html", metavar="FILE", help="write one page with tables and plots that needs no network")


def run(args: argparse.Namespace) -> int:
    """0, or 3 when the recovery is below --min-recovery."""
    from rich.console import Console
    from rich.table import Table

    from jqserve.errors import RequestError
    from jqserve.evaluate.page import page
    from jqserve.evaluate.run import Question, evaluate
    from jqserve.evaluate.summary import as_json, rows
    from jqserve.evaluate.verdict import FAILED

    if not 0 <= args.min_recovery <= 1:
        raise RequestError("--min-recovery", f"is a share from 0 to 1 (0.98 for 98 %), found {args.min_recovery:g}")
    for flag, target in (("--json", args.json), ("--html", args.html)):
        if target and target != "-" and not Path(target).resolve().parent.is_dir():
            raise RequestError(flag, f"{target}: its directory does not exist")
        if target and Path(target).is_dir():
            raise RequestError(flag, f"{target}: is a directory; give the file to write in it")
        if target and target != "-" and not os.access(Path(target).resolve().parent, os.W_OK):
            raise RequestError(flag, f"{target}: its directory cannot be written to")  # now, not after measuring
    question = Question(
        model=args.model_path,
        base=args.base,
        text=Path(args.text) if args.text else None,
        windows=args.windows,
        seqlen=args.seqlen,
        tasks=Path(args.tasks) if args.tasks else None,
        limit=args.limit,
        layers=not args.no_layers,
        speed=not args.no_speed,
        threshold=args.min_recovery,
        dtype=None if args.dtype == "auto" else args.dtype,
        activations=args.activations,
    )
    with _Bar() as bar:
        result: dict[str, Any] = evaluate(question, bar.show)
    if args.json == "-":
        print(as_json(result))
    else:
        table = Table(title=f"{args.model_path} against {args.base}" if args.base else args.model_path)
        for name in ("", "model", "base"):
            table.add_column(name, justify="left" if not name else "right")
        for row in rows(result):
            table.add_row(*row)
        Console().print(table)
        print(result["verdict"]["line"])
    if args.json and args.json != "-":
        _write(Path(args.json), as_json(result) + "\n")
    if args.html:
        _write(Path(args.html), page(result))
    return 0 if result["verdict"]["passed"] else FAILED


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class _Bar:
    """Stages on stderr, where that is a terminal."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def show(self, stage: str, done: int, of: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=of)
        self._bar.update(self._tasks[stage], completed=done, total=of)
