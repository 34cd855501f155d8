"""Tokens, the Unix socket, and the limits, with the echoing engine."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jqserve.cli import server as cli
from jqserve.client import Client, ServerError
from jqserve.errors import UnsupportedError
from jqserve.server.config import ServerConfig
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc, vllm_engine_pb2, vllm_engine_pb2_grpc
from tests.server.closed_window import call
from tests.server.fake_engine import SLOW, STUCK
from tests.server.running_server import DEMO, Running, running_server

CONFIG = ServerConfig("/models/echo", port=0, ids_only=True)
TOKEN = "s3cret"


@contextlib.contextmanager
def serving(**fields: Any) -> Iterator[Running]:
    with running_server(dataclasses.replace(CONFIG, **fields)) as (running, _):
        yield running


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises((grpc.RpcError, ServerError)) as caught:
        call()
    code = caught.value.code
    return str((code() if callable(code) else code).name)


def test_every_rpc_but_health_needs_the_token() -> None:
    with serving(api_keys=("other", TOKEN), admin=True) as running, grpc.insecure_channel(running.target) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        native, admin = jqserve_pb2_grpc.InferenceStub(channel), jqserve_pb2_grpc.AdminStub(channel)
        compat = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        generate = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]))
        calls: list[Callable[[Any], Any]] = [
            lambda md: list(native.Generate(generate, metadata=md)),
            lambda md: native.Score(pb.ScoreRequest(), metadata=md),
            lambda md: native.GetServerInfo(pb.GetServerInfoRequest(), metadata=md),
            lambda md: admin.FlushCache(pb.FlushCacheRequest(), metadata=md),
            lambda md: compat.HealthCheck(vllm_engine_pb2.HealthCheckRequest(), metadata=md),
            lambda md: list(compat.GetTokenizer(vllm_engine_pb2.GetLoadsRequest(), metadata=md)),
            lambda md: list(reflection.ServerReflectionInfo(iter([ask]), metadata=md)),
        ]
        for call in calls:
            for value in (None, "Bearer wrong", "Bearer ", TOKEN, f"Basic {TOKEN}", "Bearer s3cret2"):
                metadata = (("authorization", value),) if value else ()
                assert code_of(lambda: call(metadata)) == "UNAUTHENTICATED", value  # noqa: B023
        with Client(running.target, token=TOKEN) as client:
            assert client.generate([5, 6], max_new_tokens=4).wait().token_ids == [5, 6, 5, 6]
            assert TOKEN not in str(client.server_info())
        with Client(running.target, token="other") as client:
            client.server_info()


def configured(*words: str) -> ServerConfig:
    return cli.server_config(cli.parser().parse_args(words))


def test_tokens_are_read_from_a_file_and_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"\ufeff# who: us\n{TOKEN} \r\n\n  # them\nsecond\n".encode())
    file.chmod(0o640)
    config = configured("--api-key-file", str(file), "--api-key", "third\n")
    assert config.api_keys == ("third", TOKEN, "second") and not caplog.records
    assert TOKEN not in repr(config) and "third" not in repr(config)
    assert "third" not in str(config.arguments)  # which GetServerInfo shows to everybody
    file.chmod(0o644)
    configured("--api-key-file", str(file))
    assert "every user of this machine may open it (mode 0644)" in caplog.text and TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no token"),
        (b"\n \n", "holds no token"),
        (b"# none\n", "holds no token"),
        ("good\n\nclé-secrète\n".encode(), "line 3: the token has characters that gRPC cannot carry"),
        (b"a\tsecr\x00et\n", "line 1: the token has characters"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_files_without_a_token_that_can_be_sent_are_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UnsupportedError, match=says) as caught:
        configured("--api-key-file", str(file))
    assert "--api-key-file" in str(caught.value) and "secr" not in str(caught.value).replace(str(file), "")


@pytest.mark.parametrize("token", ["", " ", "\n", "clé"])
def test_a_token_that_nobody_can_send_is_refused_at_both_ends(token: str) -> None:
    for make in (lambda: configured("--api-key", token), lambda: Client("127.0.0.1:1", token=token)):
        with pytest.raises(UnsupportedError, match=r"(empty|cannot carry)"):
            make()


def test_a_token_read_with_its_line_end_is_the_token() -> None:
    with serving(api_keys=(TOKEN,)) as running:
        with Client(running.target, token=f"{TOKEN}\n") as client:
            client.server_info()
        for token, says in ((None, "wants a token"), ("other", "none of this server's")):
            with Client(running.target, token=token) as client, pytest.raises(ServerError, match=says) as caught:
                client.server_info()
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_where_no_socket_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        str(tmp_path / "file"): "is not a socket",
        str(tmp_path / "absent" / "s"): "there is no directory",
        str(tmp_path / ("s" * 108)): "107 bytes",
    }
    for path, says in cases.items():
        running = Running(dataclasses.replace(CONFIG, unix_socket=path), wait=False)
        assert running.over.wait(20) and running.code == 2 and says in caplog.text, path


def test_where_no_port_can_be(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port, says in (
            ("127.0.0.1", taken.getsockname()[1], "already in use; --port 0 picks a free one"),
            ("192.0.2.1", 0, "cannot assign"),  # an address of nobody (RFC 5737)
        ):
            running = Running(dataclasses.replace(CONFIG, host=host, port=port), wait=False)
            assert running.over.wait(20) and running.code == 2
            assert f"cannot listen on {host}:{port}: " in caplog.text and says in caplog.text


@pytest.mark.parametrize(
    ("fields", "warned"),
    [({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_keys": ("x",)}, False), ({"host": "127.0.0.1"}, False)],
)
def test_a_server_for_everybody_without_tokens_says_so(
    fields: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(**fields):
        assert ("whoever can reach this machine can use the server" in caplog.text) == warned


def test_a_folder_for_profiles_without_a_profiler() -> None:
    with pytest.raises(UnsupportedError, match="--profile-dir belongs to --admin"):
        cli.server_config(cli.parser().parse_args(["--profile-dir", "x"]))


def test_unix_socket_is_for_this_user_alone_and_may_be_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "jqserve.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # what a server that was killed leaves behind
    for _ in range(2):
        with serving(unix_socket=str(path)), Client(f"unix:{path}") as client:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
            assert client.generate([5], max_new_tokens=2).wait().token_ids == [5, 5]
            second = Running(dataclasses.replace(CONFIG, unix_socket=str(path)), wait=False)
            assert second.over.wait(20) and second.code == 2


@pytest.fixture(scope="module")
def limited() -> Iterator[Running]:
    limits: dict[str, Any] = dict(
        max_request_seconds=1.0, unread_seconds=0.5, max_message_bytes=2**16, max_concurrent_rpcs=8
    )
    with serving(**limits) as running:
        yield running


def test_a_request_that_takes_too_long_ends_with_its_status(limited: Running) -> None:
    with Client(limited.target) as client:
        began = time.monotonic()
        with pytest.raises(ServerError) as caught:
            client.generate([5], max_new_tokens=400, seed=STUCK).wait()
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and "1 s" in caught.value.details
        assert 0.9 < time.monotonic() - began < 5
        wait_until_idle(client)


def wait_until_idle(client: Client) -> None:
    end = time.monotonic() + 5
    while client.server_info().load.running:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_messages_over_the_limit_are_refused(limited: Running) -> None:
    with Client(limited.target) as client:
        assert code_of(lambda: client.generate([5] * 70_000).wait()) == "RESOURCE_EXHAUSTED"
        assert client.generate([5], max_new_tokens=2).wait().token_ids == [5, 5]


def test_more_calls_than_the_limit_are_refused(limited: Running) -> None:
    with Client(limited.target) as client:
        streams = [client.generate([5], max_new_tokens=300, seed=SLOW) for _ in range(16)]
        codes = []
        for stream in streams:
            try:
                stream.wait()
            except ServerError as error:
                codes.append(error.code)
        assert codes and set(codes) <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
        wait_until_idle(client)


def test_a_stream_that_nobody_reads_is_cancelled() -> None:
    """Its writes stop once HTTP/2's windows are full; its slot must not be held for ever."""
    engine = {"info": {"context_length": 2**20}}
    with serving(unread_seconds=0.5, engine=engine) as running, Client(running.target) as client:
        call = client.generate([5, 6], max_new_tokens=10**6, logprobs=20, n=64, flush_tokens=32, flush_ms=10_000)
        next(call.events())
        end = time.monotonic() + 30
        while client.server_info().load.running or running.server.frontend.generations:
            assert time.monotonic() < end, "an unread stream keeps its slot"
            time.sleep(0.1)
        assert running.server.frontend.servings == set()
        with pytest.raises(ServerError) as caught:
            call.wait()
        assert caught.value.code is grpc.StatusCode.CANCELLED
        assert client.generate([5], max_new_tokens=2).wait().token_ids == [5, 5]


@pytest.mark.parametrize("method", ["vllm.grpc.engine.VllmEngine/GetTokenizer", "jqserve.v1.Inference/Generate"])
def test_callers_who_read_nothing_at_all_are_let_go(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not even their first message gets out. Twice as many as there is room for."""
    config = ServerConfig(str(DEMO), port=0, unread_seconds=0.5, max_concurrent_rpcs=4)
    generate = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), sampling=pb.SamplingParams(max_new_tokens=4))
    message = generate.SerializeToString() if "Generate" in method else b""
    with contextlib.ExitStack() as stack, running_server(config) as (running, client):
        for _ in range(8):
            stack.enter_context(call(running.server.port, f"/{method}", message))
        ended, end = running.server.frontend.metrics.rpcs, time.monotonic() + 20
        while ended[method.rpartition("/")[2], "CANCELLED"] < 4:
            assert time.monotonic() < end, ended
            time.sleep(0.02)
        assert client.generate([5], max_new_tokens=1).wait().finish_reason == "length"
    assert "ExecuteBatchError" not in caplog.text


def test_bytes_that_are_no_request_are_invalid_and_nothing_worse(limited: Running) -> None:
    with grpc.insecure_channel(limited.target) as channel:
        for service, method in (
            ("jqserve.v1.Inference", "GetServerInfo"),
            ("jqserve.v1.Inference", "Tokenize"),
            ("vllm.grpc.engine.VllmEngine", "HealthCheck"),
        ):
            assert code_of(lambda: channel.unary_unary(f"/{service}/{method}")(b"\xff\xff\xff")) == "INVALID_ARGUMENT"  # noqa: B023
        bad_text = b"\x1a\x02\xff\xfe"  # field 3, two bytes that are not UTF-8
        for service in ("jqserve.v1.Inference", "vllm.grpc.engine.VllmEngine"):
            call = channel.unary_stream(f"/{service}/Generate")
            assert code_of(lambda: list(call(bad_text))) == "INVALID_ARGUMENT"  # noqa: B023


def test_a_call_without_a_request_is_told_so(limited: Running) -> None:
    with grpc.insecure_channel(limited.target) as channel:
        for service, method in (("jqserve.v1.Inference", "GetServerInfo"), ("vllm.grpc.engine.VllmEngine", "Abort")):
            call = channel.stream_unary(f"/{service}/{method}")
            assert code_of(lambda: call(iter(()), timeout=10)) == "INVALID_ARGUMENT"  # noqa: B023
