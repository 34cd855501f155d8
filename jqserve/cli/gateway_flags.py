"""The flags that `jqserve gateway` hands on, checked before anything is started: a worker loads for minutes, and smg
says nothing of one that it cannot reach but to its log."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Sequence

from jqserve.cli import server
from jqserve.cli.foreign_flags import hint
from jqserve.errors import UnsupportedError

OURS = ("model_path", "host", "port", "ready_file")  # what `jqserve gateway` sets itself
#: smg 1.13.0 sends its workers no token, opens no TLS to them and knows no Unix sockets
UNREACHABLE = ("api_key", "api_key_file", "tls_cert", "tls_key", "tls_client_ca", "unix_socket")
#: of smg 1.13.0, where its own help names none
POLICIES = (
    "random", "round_robin", "passthrough", "cache_aware", "power_of_two", "least_load", "manual",
    "consistent_hashing", "prefix_hash",
)  # fmt: skip


def check_worker_flags(text: str) -> None:
    """--worker-args. Raises `UnsupportedError` for what jqserve-server does not take, and for what would make a worker
    that smg cannot use."""
    parser = server.parser()
    parser.exit_on_error = False
    parser.set_defaults(host=None, port=None)
    try:
        known, unknown = parser.parse_known_args(shlex.split(text))
    except (ValueError, argparse.ArgumentError) as error:
        raise UnsupportedError(f"--worker-args: {error}") from None
    if unknown:
        told = hint(unknown[0].partition("=")[0]) or "see jqserve-server --help"
        raise UnsupportedError(f"--worker-args: jqserve-server has no {unknown[0]}: {told}")
    for name in OURS:
        if getattr(known, name) is not None:
            raise UnsupportedError(f"--worker-args: {flag(name)} is set by jqserve gateway; leave it out")
    for name in UNREACHABLE:
        if getattr(known, name) is not None:
            raise UnsupportedError(
                f"--worker-args: smg has no token and no TLS for its workers, and knows no Unix socket: {flag(name)} "
                "would keep it out. Workers started here listen on 127.0.0.1 only"
            )
    if known.grpc_compat == "none":
        raise UnsupportedError(
            "--worker-args: smg cannot drive a worker with --grpc-compat none; expected vllm, sglang"
        )


def check_smg_flags(smg: str, words: Sequence[str]) -> None:
    """What follows `--`, for `smg launch`. Raises `UnsupportedError` for a flag that it does not have."""
    asked = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    if not asked:
        return
    known = flags_in(help_of(smg))
    for word in asked:
        if known and not any(name.startswith(word) for name in known):  # argparse takes a flag's beginning, too
            theirs = word in flags_in(server.parser().format_help())
            hint = f"; for the workers: --worker-args '{word} ...'" if theirs else ""
            raise UnsupportedError(f"-- {word}: smg launch has no such flag{hint}")


def check_policy(smg: str, policy: str) -> None:
    """Raises `UnsupportedError` for a --policy that this smg does not have."""
    listed = re.search(r"--policy \{([a-z0-9_,\s]+)\}", help_of(smg))
    known = re.split(r"[,\s]+", listed[1].strip()) if listed else POLICIES
    if policy not in known:
        raise UnsupportedError(f"--policy {policy}: smg has no such policy; supported: {', '.join(known)}")


def help_of(smg: str) -> str:
    """`smg launch --help`; what cannot be run says nothing."""
    try:
        return subprocess.run([smg, "launch", "--help"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9-]*", text))


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
