"""GET /metrics over HTTP, for a few at a time: a port that anybody may reach must not cost threads without bound."""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from jqserve.server.metrics import Metrics

log = logging.getLogger("jqserve.server")

MAX_CONNECTIONS = 16  # each has a thread; two Prometheus servers and a curious operator need three
MAX_SECONDS = 10.0  # of a connection's life, however slowly it sends or reads; Prometheus itself gives up after 10
ELSEWHERE = b"the metrics are at /metrics; of the server's health its gRPC port tells (grpc.health.v1.Health)\n"
FULL = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """It would print a line for each scrape."""


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """Refuses what is beyond `MAX_CONNECTIONS`, and hangs up on what has lasted `MAX_SECONDS`."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._since: dict[socket.socket, float] = {}  # dispatching adds, each connection's own thread removes
        super().__init__(*arguments, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._since) >= MAX_CONNECTIONS:
            request.setblocking(False)
            with contextlib.suppress(OSError):
                request.send(FULL)
            self.shutdown_request(request)
            return
        self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second, from the thread that accepts."""
        super().service_actions()
        oldest = time.monotonic() - MAX_SECONDS
        for request, since in list(self._since.items()):
            if since < oldest:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread, which waits for it, wakes up and ends

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Its caller has hung up, or we have; socketserver would print a traceback."""
        log.debug("a connection to the metrics port ended early", exc_info=True)


def only_metrics(app: Any) -> Any:
    """404 for other paths: prometheus_client's answers all of them, so that a probe of /health would never fail."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        if environ.get("PATH_INFO", "").rstrip("/") == "/metrics":
            return app(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain"), ("Content-Length", str(len(ELSEWHERE)))])
        return [ELSEWHERE]

    return answer


def serve_metrics(metrics: Metrics, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answers GET /metrics on a thread; (the port, what stops it). Raises OSError when the port is taken."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)  # type: ignore[arg-type]
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]

    class Bound(Server):
        address_family = family

    server = make_server(str(where[0]), port, only_metrics(make_wsgi_app(registry)), Bound, handler_class=Silent)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(2)

    return server.server_port, stop
