"""The server's life: bind, start the engine, serve, drain or fail, exit."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jqserve.engine import wire
from jqserve.errors import CheckpointError, EngineUnavailableError, JqserveError, UnsupportedError
from jqserve.server import admin, health
from jqserve.server.admin import AdminServicer
from jqserve.server.compat import sglang, vllm
from jqserve.server.config import ServerConfig
from jqserve.server.frontend import Frontend, State
from jqserve.server.guard import Guard
from jqserve.server.launch import Launch, RunningEngine
from jqserve.server.metrics_http import serve_metrics
from jqserve.server.pb import jqserve_pb2, jqserve_pb2_grpc, sglang_scheduler_pb2_grpc, vllm_engine_pb2_grpc
from jqserve.server.progress import StartProgress
from jqserve.server.receive import Receiving
from jqserve.server.servicer import InferenceServicer
from jqserve.server.tokenizer import load_tokenizer
from jqserve.server.tracing import Tracer
from jqserve.server.transport import address, listen

log = logging.getLogger("jqserve.server")

SERVICE = jqserve_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
OPTIONS = (
    ("grpc.max_send_message_length", 64 * 2**20),
    ("grpc.max_metadata_size", 16 * 2**10),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server beside the first
    # Gateways ping idle connections every 30 s; the C core's own limit of 300 s would close them.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The probe grows the window of every stream, read or not, to that of the fastest: 96 messages of 16 MiB that nobody
    # had asked for took 1.8 GB, and 0.6 GB without it. What is asked for has a window of its size in any case.
    ("grpc.http2.bdp_probe", 0),
)
LINGER = 0.5  # seconds more of answering UNAVAILABLE: a call that meets the closing itself would read CANCELLED
VERDICT = 30.0  # seconds that the engine has to say what is wrong with a checkpoint whose tokenizer does not load
LAST_WORDS = 2.0  # seconds that statuses have to reach their callers before the sockets close


class Server:
    """One front end with one engine. `run` is its whole life."""

    def __init__(
        self,
        config: ServerConfig,
        launch: Launch,
        *,
        announce: Callable[[str], None] = lambda text: print(text, flush=True),
        on_ready: Callable[[int], None] = lambda port: None,
    ) -> None:
        """`announce` shows the plan and the address; `on_ready` is called with the port when requests are served."""
        self.config = config
        self.port = 0
        self.metrics_port = 0
        self.services: tuple[str, ...] = ()
        self._launch = launch
        self._announce, self._on_ready = announce, on_ready
        self._drain = asyncio.Event()
        self._hurry = asyncio.Event()
        self._opened = asyncio.Event()  # the engine has read the checkpoint's configs and headers
        self._shown = StartProgress()

    def drain(self) -> None:
        """Finish what runs, take nothing new, then return from `run`. A second call ends what runs, too."""
        if self._drain.is_set():
            self._hurry.set()
        self._drain.set()

    async def run(self, *, handle_signals: bool = True) -> int:
        """Returns the exit status: 0 after a drain, 1 when the engine died, 2 when the user has to change something."""
        try:
            self._check_ready_file()
            self.frontend = Frontend(self.config)
            if endpoint := self.config.otlp_traces_endpoint:
                self.frontend.tracer = Tracer("jqserve", endpoint)
            server = self._make_server()
            self.port = listen(server, self.config)
            stop_metrics = self._serve_metrics()
        except JqserveError as error:
            log.error("%s", error)
            return 2
        for service in self.services:
            self.health.set(service, serving=False)
        await server.start()
        if handle_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.drain)
        log.info("bound to %s; loading %s", self._address(), self.config.model_path)
        engine = await self._launch(self._progress)
        watch = asyncio.ensure_future(self.frontend.watch())
        try:
            code = await self._serve(engine)
            await asyncio.sleep(LINGER)
            await server.stop(LAST_WORDS)
        finally:
            watch.cancel()
            await engine.stop()
            stop_metrics()
            self.frontend.close()
        return code

    def _make_server(self) -> grpc.aio.Server:
        """With every service that this server has; `services` names them."""
        config, frontend = self.config, self.frontend
        servicers: dict[str, tuple[Any, Any]] = {
            SERVICE: (jqserve_pb2_grpc.add_InferenceServicer_to_server, InferenceServicer(frontend))
        }
        if config.admin:
            servicers[admin.SERVICE] = (jqserve_pb2_grpc.add_AdminServicer_to_server, AdminServicer(frontend))
        if config.grpc_compat == "vllm":
            adding = vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server
            servicers[vllm.SERVICE] = (adding, vllm.VllmServicer(frontend))
        elif config.grpc_compat == "sglang":
            adding = sglang_scheduler_pb2_grpc.add_SglangSchedulerServicer_to_server
            servicers[sglang.SERVICE] = (adding, sglang.SglangServicer(frontend))
        self.services = tuple(servicers)

        def refused(method: str, status: str) -> None:
            frontend.metrics.rpc(method.rsplit("/", 1)[-1] if method.startswith(ours) else "other", status)

        ours = tuple(f"/{service}/" for service in self.services)
        most = config.max_message_bytes
        guard = Guard(
            config.api_keys, self.services, refused, lambda: Receiving(most), frontend.check_sizes,
            config.max_concurrent_rpcs,
        )  # fmt: skip
        server = grpc.aio.server(
            options=(*OPTIONS, ("grpc.max_receive_message_length", config.max_message_bytes)),
            interceptors=(guard,),
            maximum_concurrent_rpcs=4 * config.max_concurrent_rpcs,  # the guard's limit, with room for those it refuses
        )
        for adding, servicer in servicers.values():
            adding(servicer, server)
        self.health = health.HealthServicer(frontend)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection.enable_server_reflection((*self.services, health.SERVICE, reflection.SERVICE_NAME), server)
        return server

    def _serve_metrics(self) -> Callable[[], None]:
        """Starts what --metrics-port asks for; what stops it. Raises `UnsupportedError`."""
        config = self.config
        if config.metrics_port is None:
            return lambda: None
        try:
            self.metrics_port, stop = serve_metrics(self.frontend.metrics, config.metrics_host, config.metrics_port)
        except OSError as error:
            raise UnsupportedError(
                f"--metrics-port {config.metrics_port} on {config.metrics_host}: {error.strerror or error}"
            ) from None
        log.info("metrics on http://%s/metrics", address(config.metrics_host, self.metrics_port))
        return stop

    async def _serve(self, engine: RunningEngine) -> int:
        frontend = self.frontend
        frontend.link, frontend.engine_pid = engine.link, engine.pid
        engine.link.configure(self.config.engine)
        start = asyncio.ensure_future(self._start(engine))
        drain = asyncio.ensure_future(self._drain.wait())
        try:
            await asyncio.wait((start, drain), return_when=asyncio.FIRST_COMPLETED)
            self._shown.close()
            if not start.done():
                log.info("told to stop before it was ready (%s)", frontend.status_text)
                return 0
            start.result()
            await asyncio.wait((drain, engine.link.closed), return_when=asyncio.FIRST_COMPLETED)
            if engine.link.closed.done():
                return await self._engine_died(engine)
            return await self._drained(engine)
        except EngineUnavailableError as error:
            frontend.state, frontend.status_text = State.FAILED, str(error)
            log.error("the engine did not start: %s (%s)", error, await engine.how_it_ended())
            return 1
        except JqserveError as error:
            frontend.state, frontend.status_text = State.FAILED, str(error)
            log.error("%s", error)
            return 2
        finally:
            start.cancel()
            drain.cancel()

    async def _start(self, engine: RunningEngine) -> None:
        """The tokenizer loads on a thread while the engine loads the weights."""
        config, frontend = self.config, self.frontend
        if not config.ids_only:
            source = config.tokenizer_path or config.model_path
            revision = None if config.tokenizer_path else config.revision
            try:
                frontend.tokenizer = await asyncio.to_thread(load_tokenizer, source, revision, config.chat_template)
            except CheckpointError:
                if not config.tokenizer_path:
                    await self._verdict(engine)
                raise
        elif config.chat_template:
            raise UnsupportedError("--chat-template needs a tokenizer; give --tokenizer-path")
        frontend.ready(await engine.link.ready)
        for service in self.services:
            self.health.set(service, serving=True)
        self._announce(f"listening on {self._address()}")
        self._write_ready_file()
        self._on_ready(self.port)

    async def _verdict(self, engine: RunningEngine) -> None:
        """Raises what the engine says of a checkpoint that is none, or cannot be had: that its tokenizer is not there
        either is no news."""
        opened = asyncio.ensure_future(self._opened.wait())
        await asyncio.wait((opened, engine.link.ready), timeout=VERDICT, return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
        if engine.link.ready.done():
            engine.link.ready.result()

    async def _drained(self, engine: RunningEngine) -> int:
        frontend = self.frontend
        frontend.state, frontend.status_text = State.DRAINING, "draining"
        self.health.shut_down()
        log.info("draining: %d requests are running", len(frontend.generations))
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(e.wait()) for e in (frontend.idle, self._hurry)]
        await asyncio.wait(
            [*waits, engine.link.closed], timeout=self.config.drain_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        for wait in waits:
            wait.cancel()
        if engine.link.closed.done() and not frontend.idle.is_set():
            return await self._engine_died(engine)
        if not frontend.idle.is_set():
            log.warning("%d requests did not finish; ending them", len(frontend.generations))
            frontend.fail_all(EngineUnavailableError("the server shut down before this request finished"))
        log.info("drained")
        return 0

    async def _engine_died(self, engine: RunningEngine) -> int:
        """The link has failed the running requests already; new ones are refused until the statuses are out."""
        self.frontend.state, self.frontend.status_text = State.FAILED, engine.link.closed.result()
        self.health.shut_down()
        log.error("the engine died: %s (%s); exiting", engine.link.closed.result(), await engine.how_it_ended())
        return 1

    def _progress(self, progress: wire.Progress) -> None:
        self._opened.set()
        if progress.stage in ("forecast", "plan"):
            self._shown.close()
            self._announce(progress.text)
        else:
            self.frontend.status_text = f"{progress.stage}: {progress.text}"
            self._shown.show(progress)

    def _address(self) -> str:
        if self.config.unix_socket:
            return f"unix:{self.config.unix_socket}"
        return address(self.config.host, self.port or self.config.port)

    def _check_ready_file(self) -> None:
        """Raises `UnsupportedError`: better now than when a large model is loaded."""
        if self.config.ready_file:
            folder = Path(self.config.ready_file).parent
            if not os.access(folder, os.W_OK) or not folder.is_dir() or Path(self.config.ready_file).is_dir():
                raise UnsupportedError(f"--ready-file {self.config.ready_file}: no file can be written there")

    def _write_ready_file(self) -> None:
        if self.config.ready_file:
            path = Path(self.config.ready_file)
            scratch = path.with_name(f".{path.name}.{os.getpid()}")
            facts = {"host": self.config.host, "port": self.port, "pid": os.getpid(), "target": self._address()}
            more = {"engine_pid": self.frontend.engine_pid, "metrics_port": self.metrics_port}
            scratch.write_text(json.dumps({**facts, **more}))
            scratch.replace(path)  # a reader never sees half of it
