"""`jqserve top`: what a running server is doing, in the terminal, refreshed until Ctrl-C."""

from __future__ import annotations

import argparse
import time
from typing import Any

from jqserve.client import Client, ServerError, Tls
from jqserve.server.pb import jqserve_pb2 as pb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", nargs="?", default="127.0.0.1:30000", help="host:port or unix:/path (default: 127.0.0.1:30000)")
    add("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (default: 1)")
    add("--once", action="store_true", help="print one look and end")
    add("--token", default=None, help="for a server that asks for one")
    add("--tls-ca", default=None, metavar="PEM", help="speak TLS; who signed the server's certificate")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    tls = Tls(ca=args.tls_ca) if args.tls_ca else None
    console = Console()
    with Client(args.target, token=args.token, tls=tls) as client:
        before, since = client.server_info(timeout=5), time.monotonic()
        if args.once:
            console.print(table(args.target, before, 0.0))
            return 0
        try:
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(max(0.1, args.interval))
                    try:
                        info, now = client.server_info(timeout=5), time.monotonic()
                    except ServerError as error:
                        live.update(f"{args.target}: {error}", refresh=True)
                        continue
                    tokens = info.load.generated_tokens - before.load.generated_tokens
                    live.update(table(args.target, info, tokens / (now - since)), refresh=True)
                    before, since = info, now
        except KeyboardInterrupt:
            return 0


def table(target: str, info: pb.GetServerInfoResponse, tokens_per_second: float) -> Any:
    """One look: state, load, pages, speed."""
    from rich.table import Table

    load = info.load
    state = pb.ServerState.Name(info.state).removeprefix("SERVER_STATE_").lower()
    view = Table(title=f"{target}: {state}, up {info.uptime_seconds:,.0f} s", show_header=False, min_width=60)
    view.add_column(justify="right", style="bold")
    view.add_column()
    cached = load.cached_tokens / load.prompt_tokens if load.prompt_tokens else 0.0
    rows = {
        "sequences": f"{load.running} running, {load.waiting} waiting",
        "speed": f"{tokens_per_second:,.0f} tokens/s; {load.mean_batch:.1f} sequences a step on average",
        "KV pages": f"{bar(load.pages_used, load.pages_total)} {load.pages_used:,} of {load.pages_total:,}",
        "prefix cache": f"{cached:.0%} of {load.prompt_tokens:,} prompt tokens",
        "so far": f"{load.generated_tokens:,} tokens in {load.steps:,} steps, {load.preemptions:,} preemptions",
        "recompilations": str(load.compilations_after_warmup),
        "processes": f"front end {info.frontend_pid}, engine {info.engine_pid or 'in the same'}",
        "status": info.status_text,
    }
    for name, text in rows.items():
        view.add_row(name, text)
    return view


def bar(used: int, total: int, width: int = 20) -> str:
    full = round(width * used / total) if total else 0
    return "█" * full + "░" * (width - full)
