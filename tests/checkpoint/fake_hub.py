"""A Hub of one model on this machine: what huggingface_hub asks of the real one for snapshots and ranges of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/name"


class FakeHub:
    """`url` for HF_ENDPOINT; `sent`: bytes of each file that went out."""

    def __init__(self, folder: Path) -> None:
        self.sent: dict[str, int] = {}
        sent = self.sent

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                files = sorted(p.name for p in folder.iterdir() if p.is_file())
                if path.startswith(f"/api/models/{MODEL}/tree/"):
                    entries = [_entry(folder / name) for name in files]
                    return self._answer(json.dumps(entries).encode(), {"Content-Type": "application/json"})
                if path.startswith(f"/api/models/{MODEL}"):
                    siblings = [{"rfilename": name} for name in files]
                    facts = {"_id": "1", "id": MODEL, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                    return self._answer(json.dumps(facts).encode(), {"Content-Type": "application/json"})
                match = re.fullmatch(rf"/{MODEL}/resolve/[^/]+/(.+)", path)
                if match is None or match[1] not in files:
                    return self._answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)
                data = (folder / match[1]).read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                status, span = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if span:
                    total, last = len(data), int(span[2] or len(data) - 1)
                    data, status = data[int(span[1]) : last + 1], 206
                    headers["Content-Range"] = f"bytes {span[1]}-{int(span[1]) + len(data) - 1}/{total}"
                if self.command == "GET":
                    sent[match[1]] = sent.get(match[1], 0) + len(data)
                return self._answer(data, headers, status)

            def _answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeHub]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def _entry(path: Path) -> dict[str, object]:
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}
