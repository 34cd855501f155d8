"""TLS and mTLS from the seat of one who has the wrong file: each gets a clear error, here or there."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from jqserve.client import Client, ServerError, Tls
from jqserve.credentials import CERTIFICATE, out_of_date, point
from jqserve.errors import UnsupportedError
from jqserve.server.config import ServerConfig
from tests.server.authority import Authority
from tests.server.running_server import Running, running_server

CONFIG = ServerConfig("/models/echo", port=0, ids_only=True)


@contextlib.contextmanager
def serving(**fields: Any) -> Iterator[Running]:
    with running_server(dataclasses.replace(CONFIG, **fields)) as (running, _):
        yield running


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"), "others")


def ask(running: Running, tls: Tls | None) -> int:
    with Client(running.target, tls=tls) as client:
        return int(client.server_info(timeout=20).frontend_pid)


def refused(running: Running, tls: Tls | None) -> str:
    """Why no connection came about."""
    with pytest.raises(ServerError) as caught:
        ask(running, tls)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    return caught.value.details


def test_the_servers_certificate(ours: Authority, others: Authority, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = ours.issue("server")
    with serving(tls_cert=cert, tls_key=key) as running:
        assert ask(running, Tls(ca=ours.ca)) == os.getpid()
        assert "it wants TLS" in refused(running, None)
        assert "not signed by the authority" in refused(running, Tls(ca=others.ca))
        assert "not signed by the authority" in refused(running, Tls())
        assert "for another name" in refused(running, Tls(ca=ours.ca, server_name="elsewhere"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("days", "client", "server"),
    [((-5, -1), "has expired", "has expired on"), ((1, 5), "is not valid yet", "is not valid before")],
)
def test_a_certificate_out_of_date(
    ours: Authority, caplog: pytest.LogCaptureFixture, days: tuple[int, int], client: str, server: str
) -> None:
    """The server says so in its log, for its clients are the only ones that would."""
    cert, key = ours.issue(f"late{days[0]}", days=days)
    with serving(tls_cert=cert, tls_key=key) as running:
        assert client in refused(running, Tls(ca=ours.ca))
    assert f"--tls-cert {cert} {server}" in caplog.text
    with pytest.raises(UnsupportedError, match=server):
        Tls(ca=ours.ca, cert=cert, key=key).credentials()


def test_the_clients_certificate(ours: Authority, others: Authority) -> None:
    cert, key = ours.issue("server")
    good, stranger, late = ours.issue("client"), others.issue("client"), ours.issue("late", days=(-5, -1))
    with serving(tls_cert=cert, tls_key=key, tls_client_ca=ours.ca) as running:
        assert ask(running, Tls(ours.ca, *good)) == os.getpid()
        for tls in (None, Tls(ca=ours.ca), Tls(ours.ca, *stranger)):
            assert "a certificate of this client" in refused(running, tls)
        # Ours says so before it connects; another client gets the same answer as a stranger.
        pair = [Path(path).read_bytes() for path in (ours.ca, late[1], late[0])]
        with grpc.secure_channel(running.target, grpc.ssl_channel_credentials(*pair)) as channel:
            client = Client(channel=channel)
            with pytest.raises(ServerError, match="a certificate of this client"):
                client.server_info(timeout=20)


def test_a_client_with_tls_at_a_plain_port(ours: Authority) -> None:
    with serving() as running:
        assert "does not speak TLS" in refused(running, Tls(ca=ours.ca))
    port = running.server.port
    with pytest.raises(ServerError, match="nothing listens there"), Client(f"127.0.0.1:{port}") as client:
        client.server_info(timeout=20)


@pytest.fixture(scope="module")
def files(ours: Authority, others: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "text").write_text("nothing")
    (folder / "garbage").write_text("-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n")
    cert, key = ours.issue("one")
    secret = ours.issue("secret", passphrase="open sesame")
    names = {"ca": ours.ca, "cert": cert, "key": key, "other key": others.issue("other")[1], "folder": str(folder)}
    names |= {"secret cert": secret[0], "secret key": secret[1], "absent": str(folder / "absent")}
    return names | {name: str(folder / name) for name in ("text", "garbage")}


BAD = [
    ({"cert": "cert"}, "go together"),
    ({"key": "key"}, "go together"),
    ({"cert": "absent", "key": "key"}, "No such file"),
    ({"cert": "folder", "key": "key"}, "Is a directory"),
    ({"cert": "text", "key": "key"}, "is not PEM"),
    ({"cert": "cert", "key": "text"}, "is not PEM"),
    ({"cert": "garbage", "key": "key"}, "holds no certificate"),
    ({"cert": "key", "key": "key"}, "holds no certificate"),
    ({"cert": "cert", "key": "cert"}, "holds no private key"),
    ({"cert": "cert", "key": "other key"}, "is not the key of"),
    ({"cert": "secret cert", "key": "secret key"}, "has a passphrase"),
    ({"cert": "cert", "key": "key", "ca": "garbage"}, "holds no certificate"),
    ({"cert": "cert", "key": "key", "ca": "key"}, "holds no certificate"),
    ({"cert": "cert", "key": "key", "ca": "absent"}, "No such file"),
]


@pytest.mark.parametrize(("named", "says"), BAD, ids=[" ".join(named.values()) for named, _ in BAD])
def test_files_that_will_not_do_are_told_apart_at_both_ends(
    files: dict[str, str], named: dict[str, str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {name: files[file] for name, file in named.items()}
    with pytest.raises(UnsupportedError, match=says):
        Tls(**paths).credentials()
    flags = {"tls_cert": paths.get("cert"), "tls_key": paths.get("key"), "tls_client_ca": paths.get("ca")}
    running = Running(dataclasses.replace(CONFIG, **flags), wait=False)
    assert running.over.wait(20) and running.code == 2
    assert says in caplog.text and "--tls-" in caplog.text


def test_a_certificate_without_its_key_does_not_end_the_clients_process(files: dict[str, str]) -> None:
    """gRPC's core aborts it (grpcio 1.80.1)."""
    script = (
        "import sys; from jqserve.client import Client, Tls; Client(tls=Tls(cert=sys.argv[1])).server_info(timeout=5)"
    )
    done = subprocess.run([sys.executable, "-c", script, files["cert"]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "go together" in done.stderr, (done.returncode, done.stderr)


def test_a_key_that_everybody_may_read_is_told_of(ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """Told of and not refused: Kubernetes mounts secrets with mode 0644 unless it is told otherwise."""
    cert, key = ours.issue("open")
    Path(key).chmod(0o644)
    with serving(tls_cert=cert, tls_key=key) as running:
        assert ask(running, Tls(ca=ours.ca)) == os.getpid()
    assert f"--tls-key {key}: every user of this machine may open it (mode 0644)" in caplog.text


def test_a_unix_socket_does_not_pretend_to_tls(
    ours: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = ours.issue("server")
    fields: dict[str, Any] = {"unix_socket": str(tmp_path / "s"), "tls_cert": cert, "tls_key": key}
    running = Running(dataclasses.replace(CONFIG, **fields), wait=False)
    assert running.over.wait(20) and running.code == 2 and "--unix-socket has no TLS" in caplog.text


def test_dates_are_read_as_the_certificate_says(ours: Authority) -> None:
    """Against the peer: cryptography's own reading; and both of X.509's kinds of time, whose border is 2050."""
    from cryptography import x509

    for days in ((-9, 9), (-25_000, 40_000)):  # from 1958 to 2136
        pem = Path(ours.issue("dated", days=days)[0]).read_bytes()
        theirs = x509.load_pem_x509_certificate(pem)
        begin, end = theirs.not_valid_before_utc, theirs.not_valid_after_utc
        second = datetime.timedelta(seconds=1)
        assert not out_of_date(pem, begin) and not out_of_date(pem, end)
        assert out_of_date(pem, begin - second) == f"is not valid before {begin:%Y-%m-%d %H:%M} UTC"
        assert out_of_date(pem, end + second) == f"has expired on {end:%Y-%m-%d %H:%M} UTC"
        chain = Path(ours.ca).read_bytes() + pem
        assert len(CERTIFICATE.findall(chain)) == 2 and bool(out_of_date(chain, end + second))
    assert point(b"491231235959Z").year == 2049 and point(b"500101000000Z").year == 1950
    assert not out_of_date(b"-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----")
