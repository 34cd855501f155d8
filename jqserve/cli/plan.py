"""`jqserve plan`: what would become of every module, and whether it fits, from headers alone and without a device."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from jqserve.checkpoint.plan import LoadPlan

DEVICES = ("h200", "h100", "a100", "l40s", "l4", "b200", "cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from jqserve.cli.server import add_flags

    parser.description = (
        f"{parser.description}. The server's flags are taken as they are: put `jqserve plan` in the place of "
        "`jqserve-server`. Flags that change none of the numbers are accepted and do nothing."
    )
    parser.usage = "%(prog)s [-h] [--device NAME] [--tp N] [--json] [the server's flags] MODEL"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="what --model-path would name")
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--device", choices=DEVICES, default=None, help="the GPU to plan for (default: this machine's, or h200)"
    )
    group.add_argument(
        "--tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs to split the weights over"
    )
    group.add_argument("--json", action="store_true", help="one JSON object")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    from jqserve.cli.plan_report import report
    from jqserve.errors import UnsupportedError

    if (args.model is None) == (args.model_path is None):
        raise UnsupportedError("jqserve plan takes one model: MODEL or --model-path MODEL")
    plan, facts = report(args)
    if args.json:
        print(json.dumps({**plan.to_json(), **facts}, indent=1))
        return 0
    console = show(plan)
    for line in lines(facts):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def show(plan: LoadPlan, console: Console | None = None) -> Console:
    """The table where it fits, else its rows as lines: in 80 columns the table ended every kernel's name in "…"."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=240)
    table = plan.to_table()
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table)
    else:
        console.print(plan.to_text(), markup=False, highlight=False, soft_wrap=True)
    return console


def lines(facts: dict[str, Any]) -> list[str]:
    """The totals in words."""
    from jqserve.engine.totals import lines as totals

    found = totals(facts)
    if facts["tp"]["size"] > 1:
        found.append(f"per GPU            {facts['tp']['bytes_per_gpu'] / 2**30:9.3f} GiB of weights")
    found += [f"unquantized: {name}: {reason}" for name, reason in facts["unquantized"].items()]
    return found + [f"warning: {warning}" for warning in facts["warnings"]]
