"""Step programs traced and lowered by processes of their own, several at once.

Tracing and lowering one program costs 1.5 to 4 seconds of Python under the interpreter's lock, and a cold start of an
8B model has 29 of them: 83 of the 96 seconds of its warm-up on an H200 (bench/results/startup_before.json), in which
16 cores had little to compile; with eight processes it takes 60 (startup.json). Children of this process have no GPU
and need none: what they lower is for the platform and the device that they are told, and goes back as StableHLO.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import queue
import select
import subprocess
import sys
import threading
from typing import Any

import jax

from jqserve.engine.batch import StepShape
from jqserve.engine.cache import CacheShape
from jqserve.engine.programs import Begin, Draw, Forward, Fused, Program
from jqserve.engine.slots import empty
from jqserve.engine.split import begin_program, draw_program, forward_program
from jqserve.engine.step import Structure, make_state, step_program
from jqserve.engine.traceable import Traceable
from jqserve.models.build import build, split
from jqserve.models.config import ModelConfig
from jqserve.ops.device import Device, use_device

log = logging.getLogger(__name__)

MOST = 8  # processes of 400 MB: 29 programs of 3 s are lowered in 12 s, less than compiling the first of them takes
PROGRAMS_EACH = 3  # fewer are lowered here sooner than a process has imported JAX (2 to 3 s)
PATIENCE = 120.0  # seconds for one program; on a busy machine they have taken 10
FLAGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")


def traceable(
    structure: Structure, shape: StepShape, program: Program, leaves: Any, kv: Any, state: Any, params: Any
) -> Traceable:
    """Any of an engine's programs, for arguments that are arrays or ShapeDtypeStructs."""
    match program:
        case Fused():
            return step_program(structure, shape, program, leaves, kv, state, params)
        case Begin():
            return begin_program(structure, shape, program, leaves, kv, state)
        case Forward():
            return forward_program(structure, shape, program, leaves, kv, state, params)
        case Draw():
            return draw_program(shape, program, state, params)


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a program of one engine is made from, without an array in it."""

    model: ModelConfig
    params: Any  # the parameter tree, ShapeDtypeStructs for arrays
    shape: StepShape
    cache: CacheShape
    device: Device
    flags: dict[str, Any]

    @classmethod
    def of(cls, model: ModelConfig, params: Any, shape: StepShape, cache: CacheShape, device: Device) -> Job:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return cls(model, abstract, shape, cache, device, {name: getattr(jax.config, name) for name in FLAGS})

    def serve(self, requests: Any, replies: Any) -> None:
        """A process's whole life: a program in, what `Traceable.exported` gives out, or why not (a str). EOFError ends
        it."""
        for name, value in self.flags.items():
            jax.config.update(name, value)
        structure, leaves = split(build(self.model, self.params))
        state = jax.eval_shape(lambda: make_state(self.shape))
        params = empty(self.shape.slots)
        with use_device(self.device):
            while True:
                program = pickle.load(requests)
                try:
                    kv = self.cache.abstract()
                    one = traceable(structure, self.shape, program, leaves, kv, state, params)
                    reply: bytes | str = one.exported(self.device.platform)
                except Exception as error:
                    reply = f"{type(error).__name__}: {error}"
                pickle.dump(reply, replies)
                replies.flush()


class Lowerers:
    """The processes of one job. A context: they are started when it is entered and end when it is left. Any number of
    threads may call `lower` at once."""

    def __init__(self, job: Job, count: int) -> None:
        self._processes = [_Process(job) for _ in range(count)]
        self._idle: queue.Queue[_Process | None] = queue.Queue()  # None, for good: there is none left
        self._left, self._lock = count, threading.Lock()

    @classmethod
    def for_programs(cls, job: Job | None, programs: int) -> contextlib.AbstractContextManager[Lowerers | None]:
        """As many as so many programs and this machine's cores are worth; None instead of fewer than two."""
        count = min(MOST, programs // PROGRAMS_EACH, (os.cpu_count() or 1) // 2)
        return contextlib.nullcontext() if job is None or count < 2 else cls(job, count)

    def __enter__(self) -> Lowerers:
        for process in self._processes:
            try:
                process.start()
                self._idle.put(process)
            except OSError as error:
                self._lost(error)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    def lower(self, program: Program, one: Traceable) -> jax.stages.Lowered | None:
        """`one` is that program's. None: it has to be lowered here, and the log says why."""
        process = self._idle.get()
        if process is None:
            self._idle.put(None)
            return None
        try:
            reply = process.ask(program)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._lost(error)
            return None
        self._idle.put(process)
        if isinstance(reply, str):
            log.warning("%s: another process could not lower it: %s", program.name, reply)
            return None
        return one.imported(reply)

    def _lost(self, error: Exception) -> None:
        log.warning("a process that lowers programs is gone (%s: %s); others go on", type(error).__name__, error)
        with self._lock:
            self._left -= 1
            if not self._left:
                self._idle.put(None)


class _Process:
    def __init__(self, job: Job) -> None:
        self._job: Job | None = job  # until it has been told
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # No GPU for it: a client of it would take memory. A session of its own: Ctrl-C is for this process, whose end
        # it notices by its input's.
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from jqserve.engine.lowering import main; main()"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def ask(self, program: Program) -> bytes | str:
        """Raises OSError or EOFError when it has ended or does not answer."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        for message in (program,) if self._job is None else (self._job, program):
            pickle.dump(message, self._process.stdin)
        self._job = None
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise TimeoutError(f"no answer in {PATIENCE:.0f} seconds")
        reply: bytes | str = pickle.load(self._process.stdout)
        return reply

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def main() -> None:
    """A process of `Lowerers`: a job and then programs on stdin, replies on what was stdout."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a print of anybody's is no reply
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        pickle.load(sys.stdin.buffer).serve(sys.stdin.buffer, replies)
