"""Tokens, TLS and mTLS, the Unix socket, and the limits, with the echoing engine."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ipaddress
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jqserve.cli import server as cli
from jqserve.client import Client, ServerError, Tls
from jqserve.errors import UnsupportedError
from jqserve.server.config import ServerConfig
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import jqserve_pb2_grpc, vllm_engine_pb2, vllm_engine_pb2_grpc
from tests.server.fake_engine import SLOW, STUCK
from tests.server.running_server import Running, running_server

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


def test_tokens_are_read_from_a_file_and_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who: us\n{TOKEN}\n\nsecond\n")
    config = cli.server_config(cli.parser().parse_args(["--api-key-file", str(file), "--api-key", "third"]))
    assert config.api_keys == ("third", TOKEN, "second")
    assert TOKEN not in repr(config) and "third" not in repr(config)
    assert "third" not in str(config.arguments)  # which GetServerInfo shows to everybody
    file.write_text("# none\n")
    with pytest.raises(UnsupportedError, match="holds no token"):
        cli.server_config(cli.parser().parse_args(["--api-key-file", str(file)]))


class Authority:
    """Signs certificates for 127.0.0.1, and writes everything as PEM."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(self.key.public_key(), name, authority=True)
        self.ca = self._write(f"{name}-ca.pem", self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, subject: str) -> tuple[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), subject, authority=False)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return (
            self._write(f"{self.name}-{subject}.pem", certificate.public_bytes(serialization.Encoding.PEM)),
            self._write(f"{self.name}-{subject}.key", pem),
        )

    def _sign(self, public: Any, subject: str, *, authority: bool) -> x509.Certificate:
        def called(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = x509.CertificateBuilder().subject_name(called(subject)).issuer_name(called(self.name))
        builder = builder.public_key(public).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1)).add_extension(names, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return str(self.folder / name)


def test_tls_and_mtls(tmp_path: Path) -> None:
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    cert, key = ours.issue("server")

    def ask(running: Running, tls: Tls | None) -> int:
        with Client(running.target, tls=tls) as client:
            return int(client.server_info(timeout=5).frontend_pid)

    with serving(tls_cert=cert, tls_key=key) as running:
        assert ask(running, Tls(ca=ours.ca)) == os.getpid()
        assert code_of(lambda: ask(running, None)) == "UNAVAILABLE"
        assert code_of(lambda: ask(running, Tls(ca=others.ca))) == "UNAVAILABLE"
    client_cert, client_key = ours.issue("client")
    stranger_cert, stranger_key = others.issue("client")
    with serving(tls_cert=cert, tls_key=key, tls_client_ca=ours.ca) as running:
        assert ask(running, Tls(ca=ours.ca, cert=client_cert, key=client_key)) == os.getpid()
        assert code_of(lambda: ask(running, Tls(ca=ours.ca))) == "UNAVAILABLE"
        assert code_of(lambda: ask(running, Tls(ca=ours.ca, cert=stranger_cert, key=stranger_key))) == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tls_cert": "/absent"}, "go together"),
        ({"tls_cert": "/absent", "tls_key": "/absent"}, "--tls-cert /absent: No such file"),
        ({"tls_cert": __file__, "tls_key": __file__}, "is not PEM"),
        ({"unix_socket": __file__}, "is not a socket"),
    ],
)
def test_what_cannot_be_listened_with(
    fields: dict[str, str], says: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    if "PEM" in says:
        fields = {name: str(tmp_path / "plain") for name in fields}
        (tmp_path / "plain").write_text("nothing")
    running = Running(dataclasses.replace(CONFIG, **fields), wait=False)  # type: ignore[arg-type]
    assert running.over.wait(20) and running.code == 2
    assert says in caplog.text


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
