"""The front end's memory under many concurrent messages of the largest size that it takes.

    python -m bench.big_messages [--count 96] [--connections 12] [--megabytes 16] [--out DIR] [-- SERVER FLAGS]

Starts jqserve-server on the demo model and sends, kind by kind, `count` requests at once: a text, token ids, stop
strings, a JSON schema, a chat of that size; then `count` uploads that stop a little before their end and stay so. Told
per kind: the statuses, and the front end's resident memory before, at its peak (the kernel's mark) and after.
Meanwhile a small request runs again and again; the longest that one took is told too.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.soak_watch import megabytes
from jqserve.client import AsyncClient, ServerError
from jqserve.server.pb import jqserve_pb2 as pb

METHOD = "/jqserve.v1.Inference/Generate"
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
MARGIN = 4096  # bytes less than the limit


def payloads(size: int) -> dict[str, Callable[[], bytes]]:
    """Requests of about `size` bytes by kind."""
    size -= MARGIN

    def request(**fields: Any) -> bytes:
        return pb.GenerateRequest(**fields).SerializeToString()

    one, text = pb.TokenIds(ids=[5]), "word " * (size // 5)
    return {
        "text": lambda: request(text=text),
        "ids": lambda: request(token_ids=pb.TokenIds(ids=[4000] * (size // 2))),
        "stops": lambda: request(token_ids=one, sampling=pb.SamplingParams(stop=["abc"] * (size // 5))),
        "biases": lambda: request(
            token_ids=one, sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(size // 14), 1.0))
        ),
        "schema": lambda: request(token_ids=one, json_schema="[" * size),
        "chat": lambda: request(chat=pb.Chat(messages_json='[{"role": "user", "content": "' + text + '"}]')),
        "unknown field": lambda: request(token_ids=one) + b"\x9a\x3f" + varint(size) + bytes(size),  # field 1011
    }


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def reset_peak(pid: int) -> None:
    """The kernel forgets the high-water mark of the resident memory."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> float:
    """MB, since `reset_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


async def send(channel: grpc.aio.Channel, data: bytes, timeout: float = 60.0, method: str = METHOD) -> str:
    """The status that the call got."""
    call: Any = channel.unary_stream(method)(data, timeout=timeout)
    try:
        async for _ in call:
            pass
        return "OK"
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)


class Stalling:
    """A relay that hands on the first `most` bytes of every connection, and then nothing more."""

    def __init__(self, target: str, most: int) -> None:
        self.host, _, self.port = target.rpartition(":")
        self.most = most
        self.stalled = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Stalling:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self.host, int(self.port))
        down = asyncio.create_task(self._copy(up_reader, writer, sys.maxsize))
        try:
            await self._copy(reader, up_writer, self.most)
            self.stalled += 1
            await down
        finally:
            down.cancel()
            up_writer.close()
            writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int) -> None:
        with contextlib.suppress(ConnectionError):
            while most > 0 and (data := await reader.read(min(most, 2**16))):
                most -= len(data)
                writer.write(data)
                await writer.drain()


@contextlib.asynccontextmanager
async def small_requests(target: str, took: list[float]) -> AsyncIterator[list[str]]:
    """Beside the big ones, one after the other; `took`: seconds of each. Gives the list of those that failed."""
    failed: list[str] = []

    async def run() -> None:
        async with AsyncClient(target) as client:
            while True:
                began = time.monotonic()
                try:
                    await client.generate([5, 6, 7], max_new_tokens=2, temperature=0).wait()
                except ServerError as error:
                    failed.append(str(error))
                took.append(time.monotonic() - began)
                await asyncio.sleep(0.05)

    task = asyncio.create_task(run())
    try:
        yield failed
    finally:
        task.cancel()


async def measure(target: str, pid: int, kind: str, data: bytes, count: int, connections: int) -> dict[str, Any]:
    """`count` of them at once."""
    took: list[float] = []
    before = megabytes(pid)
    reset_peak(pid)
    async with contextlib.AsyncExitStack() as stack, small_requests(target, took) as failed:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(target, options=OPTIONS))
            for _ in range(connections)
        ]
        began = time.monotonic()
        statuses = await asyncio.gather(*(send(channels[i % connections], data) for i in range(count)))
        seconds = time.monotonic() - began
    await asyncio.sleep(2.0)  # `receive.SETTLED`, and what gives the memory back
    return row(kind, len(data), count, before, pid, statuses, took, failed, seconds)


async def measure_stalled(
    target: str, pid: int, data: bytes, count: int, hold: float, method: str = METHOD
) -> dict[str, Any]:
    """`count` uploads, each on a connection of its own, that stop 64 KiB before their end for `hold` seconds."""
    took: list[float] = []
    before = megabytes(pid)
    reset_peak(pid)
    async with (
        Stalling(target, len(data) - 2**16) as relay,
        contextlib.AsyncExitStack() as stack,
        small_requests(target, took) as failed,
    ):
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(relay.target, options=OPTIONS))
            for _ in range(count)
        ]
        began = time.monotonic()
        statuses = await asyncio.gather(*(send(channel, data, hold, method) for channel in channels))
        seconds = time.monotonic() - began
    await asyncio.sleep(2.0)  # `receive.SETTLED`, and what gives the memory back
    return {**row("stalled", len(data), count, before, pid, statuses, took, failed, seconds), "stalled": relay.stalled}


def row(
    kind: str, size: int, count: int, before: float, pid: int, statuses: list[str], took: list[float],
    failed: list[str], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    return {
        "kind": kind,
        "bytes": size,
        "count": count,
        "statuses": dict(collections.Counter(statuses)),
        "mb_before": round(before),
        "mb_peak": round(peak(pid)),
        "mb_after": round(megabytes(pid)),
        "seconds": round(seconds, 2),
        "small_requests": len(took),
        "small_longest_s": round(max(took, default=0.0), 2),
        "small_failed": failed[:3],
    }


async def run(args: argparse.Namespace, target: str, pid: int) -> list[dict[str, Any]]:
    rows = []
    size = int(args.megabytes * 2**20)
    for kind, make in payloads(size).items():
        data = make()
        rows.append(await measure(target, pid, kind, data, args.count, args.connections))
        print(rows[-1], flush=True)
    data = payloads(size)["text"]()
    rows.append(await measure_stalled(target, pid, data, args.count, 12.0))
    print(rows[-1], flush=True)
    return rows


async def start(flags: list[str], folder: Path) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    """A server, and what its ready file says."""
    ready = folder / "ready.json"
    command = [sys.executable, "-m", "jqserve.cli.server", "--port", "0", "--ready-file", str(ready), *flags]
    with open(folder / "log", "w") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    while not ready.exists():
        if process.returncode is not None:
            raise SystemExit((folder / "log").read_text()[-2000:])
        await asyncio.sleep(0.1)
    return process, json.loads(ready.read_text())


async def amain(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        process, facts = await start(["--context-length", "384", *args.server], Path(folder))
        try:
            return await run(args, facts["target"], facts["pid"])
        finally:
            process.kill()
            await process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--connections", type=int, default=12)
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--out", default=None)
    parser.add_argument("server", nargs="*", help="after --: more flags of the server")
    args = parser.parse_args()
    rows = asyncio.run(amain(args))
    from bench.record import write

    print(write("big_messages", rows, args.out, worst_mb=max(row["mb_peak"] for row in rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
