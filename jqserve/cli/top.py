"""`jqserve top`: what a running server is doing, in the terminal, refreshed until Ctrl-C.

It asks GetServerInfo of the port that serves requests, with the same token and certificates as any client: nothing has
to be opened for it. Where the output is no terminal there is one look, as with --once.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import grpc

from jqserve.client import Client, ServerError, Tls
from jqserve.credentials import read_tokens
from jqserve.errors import JqserveError, UnsupportedError
from jqserve.server.pb import jqserve_pb2 as pb

PATIENCE = 5.0  # seconds for an answer
MAX_INTERVAL = 86_400

#: status -> the flags that may help
HINTS = {
    grpc.StatusCode.UNAUTHENTICATED: "--api-key-file FILE, or --token TOKEN",
    grpc.StatusCode.UNAVAILABLE: "TLS: --tls-ca CA; mTLS: also --tls-cert and --tls-key",
    grpc.StatusCode.DEADLINE_EXCEEDED: f"it did not answer in {PATIENCE:g} s",
    grpc.StatusCode.UNIMPLEMENTED: "this is no jqserve",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", nargs="?", default="127.0.0.1:30000", help="host:port or unix:/path (default: 127.0.0.1:30000)")
    add("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (default: 1)")
    add("--once", action="store_true", help="print one look and end")
    add("--api-key-file", default=None, metavar="FILE", help="as the server's: the first token in it is sent")
    add("--token", "--api-key", default=None, help="the same on the command line, where other users can see it")
    add("--tls", action="store_true", help="speak TLS, and trust this system's authorities")
    add("--tls-ca", default=None, metavar="PEM", help="speak TLS; who signed the server's certificate")
    add("--tls-cert", default=None, metavar="PEM", help="this client's own, for a server with --tls-client-ca")
    add("--tls-key", default=None, metavar="PEM", help="its private key")
    add(
        "--tls-server-name", default=None, metavar="NAME", help="in the server's certificate, if it is not the target's"
    )


def run(args: argparse.Namespace) -> int:
    """0 after one look, or Ctrl-C. Raises JqserveError when the first look is refused."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    if not 0 < args.interval <= MAX_INTERVAL:
        raise UnsupportedError(f"--interval {args.interval:g}: expected seconds, above 0, at most {MAX_INTERVAL}")
    console = Console()
    with Client(args.target, token=token(args), tls=tls(args)) as client:
        try:
            before, since = client.server_info(timeout=PATIENCE), time.monotonic()
        except ServerError as error:
            hint = HINTS.get(error.code) if "nothing listens there" not in str(error) else ""
            raise JqserveError(f"{args.target}: {error}" + (f" ({hint})" if hint else "")) from error
        if args.once or not console.is_terminal:
            console.print(table(args.target, before, None))
            return 0
        try:
            with Live(table(args.target, before, None), console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(max(0.1, args.interval))
                    try:
                        info, now = client.server_info(timeout=PATIENCE), time.monotonic()
                    except ServerError as error:
                        live.update(Text(f"{args.target}: {error}"), refresh=True)
                        continue
                    # A server that was started again counts from zero.
                    tokens = max(0, info.load.generated_tokens - before.load.generated_tokens)
                    live.update(table(args.target, info, tokens / (now - since)), refresh=True)
                    before, since = info, now
        except KeyboardInterrupt:
            return 0


def token(args: argparse.Namespace) -> str | None:
    if args.token is not None and args.api_key_file is not None:
        raise UnsupportedError("--token and --api-key-file: give one of them")
    return read_tokens("--api-key-file", args.api_key_file)[0] if args.api_key_file is not None else args.token


def tls(args: argparse.Namespace) -> Tls | None:
    """None: plain text. Raises `UnsupportedError`."""
    files = Tls(ca=args.tls_ca, cert=args.tls_cert, key=args.tls_key, server_name=args.tls_server_name)
    if files == Tls() and not args.tls:
        return None
    if args.target.startswith("unix:"):
        raise UnsupportedError(f"{args.target}: a Unix socket has no TLS; leave out the --tls flags")
    return files


def table(target: str, info: pb.GetServerInfoResponse, tokens_per_second: float | None) -> Any:
    """One look: state, load, pages, speed (None: not known yet, it takes two looks)."""
    from rich.table import Table
    from rich.text import Text

    load = info.load
    state = pb.ServerState.Name(info.state).removeprefix("SERVER_STATE_").lower()
    title = Text(f"{target}: {state}, up {info.uptime_seconds:,.0f} s", style="table.title")
    view = Table(title=title, show_header=False, min_width=60)
    view.add_column(justify="right", style="bold")
    view.add_column()
    cached = load.cached_tokens / load.prompt_tokens if load.prompt_tokens else 0.0
    speed = "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s; "
    rows = {
        "sequences": f"{load.running} running, {load.waiting} waiting",
        "speed": f"{speed}{load.mean_batch:.1f} sequences a step on average",
        "KV pages": f"{bar(load.pages_used, load.pages_total)} {load.pages_used:,} of {load.pages_total:,}",
        "prefix cache": f"{cached:.0%} of {load.prompt_tokens:,} prompt tokens",
        "so far": f"{load.generated_tokens:,} tokens in {load.steps:,} steps, {load.preemptions:,} preemptions",
        "recompilations": str(load.compilations_after_warmup),
        "processes": f"front end {info.frontend_pid}, engine {info.engine_pid or 'in the same'}",
        "status": info.status_text,
    }
    for name, text in rows.items():
        view.add_row(name, Text(text))
    return view


def bar(used: int, total: int, width: int = 20) -> str:
    full = round(width * used / total) if total else 0
    return "█" * full + "░" * (width - full)
