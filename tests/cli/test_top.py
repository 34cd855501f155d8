"""`jqserve top` against secured servers: one look each, or one line that says what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jqserve.cli.main import main
from jqserve.client.connection import check_target
from jqserve.server.config import ServerConfig
from tests.server.authority import Authority
from tests.server.running_server import Running, running_server

CONFIG = ServerConfig("/models/echo", port=0, ids_only=True)


@contextlib.contextmanager
def serving(**fields: Any) -> Iterator[Running]:
    with running_server(dataclasses.replace(CONFIG, **fields)) as (running, _):
        yield running


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


def shows(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """One look and no more: the output is no terminal."""
    assert main(["top", *words]) == 0
    out, err = capsys.readouterr()
    assert "ready, up" in out and "KV pages" in out and "sequences a step" in out and err == ""


def says(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of an error."""
    assert main(["top", *words]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if "ssl_transport_security" not in line]  # gRPC's core says so, too
    assert out == "" and len(lines) == 1 and lines[0].startswith("jqserve top: error: "), (out, err)
    return lines[0]


def test_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\ns3cret\nanother\n")
    with serving(api_keys=("s3cret",)) as running:
        shows(capsys, running.target, "--api-key-file", str(file))
        shows(capsys, running.target, "--once", "--token", "s3cret")
        shows(capsys, running.target, "--api-key", "s3cret\n")
        assert "wants a token" in (text := says(capsys, running.target)) and "--api-key-file" in text
        assert "none of this server's" in (text := says(capsys, running.target, "--token", "wr0ng"))
        assert running.target in text and "wr0ng" not in text
        assert "cannot carry" in says(capsys, running.target, "--token", "clé")
        assert "give one of them" in says(capsys, running.target, "--token", "x", "--api-key-file", str(file))
        file.write_text("\n")
        assert "holds no token" in says(capsys, running.target, "--api-key-file", str(file))


def test_tls_and_client_certificates(authority: Authority, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cert, key = authority.issue("server")
    own, own_key = authority.issue("client")
    stranger = Authority(tmp_path, "others")
    theirs, their_key = stranger.issue("client")
    with serving(tls_cert=cert, tls_key=key, tls_client_ca=authority.ca, api_keys=("s3cret",)) as running:
        mine = ["--tls-ca", authority.ca, "--tls-cert", own, "--tls-key", own_key]
        shows(capfd, running.target, *mine, "--token", "s3cret")
        assert "wants a token" in says(capfd, running.target, *mine)
        assert "it wants TLS" in (text := says(capfd, running.target)) and "--tls-ca" in text
        assert "a certificate of this client" in says(capfd, running.target, "--tls-ca", authority.ca)
        strange = ["--tls-ca", authority.ca, "--tls-cert", theirs, "--tls-key", their_key]
        assert "a certificate of this client" in says(capfd, running.target, *strange)
        assert "not signed by the authority" in says(capfd, running.target, "--tls")
        assert "go together" in says(capfd, running.target, "--tls-ca", authority.ca, "--tls-cert", own)
        assert "is not the key of" in says(capfd, running.target, *mine[:-1], their_key)
        assert "No such file" in says(capfd, running.target, "--tls-ca", str(tmp_path / "absent"))
        assert "for another name" in says(capfd, running.target, *mine, "--tls-server-name", "elsewhere")


def test_a_plain_server_and_none(authority: Authority, capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as running:
        shows(capfd, running.target)
        assert "does not speak TLS" in says(capfd, running.target, "--tls-ca", authority.ca)
    assert "nothing listens there" in (text := says(capfd, running.target)) and "--tls-ca" not in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], "'' is no target: expected host:port or unix:/path"),
        (["localhost"], "'localhost' is no target"),
        (["http://127.0.0.1:30000"], "leave http:// out"),
        (["http://127.0.0.1:30000/metrics"], "leave http:// out"),
        (["127.0.0.1:99999"], "'127.0.0.1:99999' is no target"),
        (["::1:30000"], "an IPv6 address is in brackets"),
        (["--interval", "nan"], "--interval nan: expected seconds, above 0"),
        (["--interval", "inf"], "--interval inf: expected seconds, above 0"),
        (["--interval", "0"], "--interval 0: expected seconds, above 0"),
    ],
)
def test_what_can_be_no_target_is_told_at_once(
    capfd: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert expected in says(capfd, *words)


@pytest.mark.parametrize(
    "target", ["localhost:1", "[::1]:30000", "dns:///host:1", "ipv6:[::1]:1", "unix:/a/b", "unix:x"]
)
def test_what_can_is_not(target: str) -> None:
    check_target(target)


def test_a_unix_socket(tmp_path: Path, authority: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"unix:{tmp_path / 's'}"
    with serving(unix_socket=path.removeprefix("unix:"), api_keys=("s3cret",)):
        shows(capsys, path, "--token", "s3cret")
        assert "wants a token" in says(capsys, path)
        assert "a Unix socket has no TLS" in says(capsys, path, "--tls-ca", authority.ca)
    assert path in says(capsys, path)
