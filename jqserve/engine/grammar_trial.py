"""A grammar is compiled in a process of its own first, which may die of it. No jax.

It comes from a request, and llguidance bounds the result's size but not the way there. Thirty patterns that must hold
at once (`/.*a0.*/ & /.*a1.*/ & ...`, or `allOf` in a schema; 400 bytes) double its time and its memory with each of
them: 2 s and 0.3 GB at 20. A chain of 4,000 references overflows a stack of 8 MB, and the engine was gone with it.

    python -m jqserve.engine.grammar_trial TOKENIZER.JSON VOCAB_SIZE EOS_ID ...
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

SECONDS = 4  # of the processor, for one grammar; 5,000 properties of an object took 1.8 on a slow core
MEGABYTES = 512  # that one may add; the same took 61
STACK = 8 * 2**20  # bytes; enough for 1,000 references, one behind the other


class Trial:
    """The process. One thread may use it; it ends with this object."""

    def __init__(self, file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Starts it and does not wait."""
        self._words = [str(file), str(vocab_size), *map(str, eos_token_ids)]
        self._start()

    def survives(self, constraint: tuple[str, str]) -> bool:
        """False when `build` would take too much of something. It may yet raise `RequestError`."""
        if self._process.poll() is not None:  # somebody else's doing, and not that of a grammar
            self._again()
        assert self._process.stdin is not None and self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"the process that tries grammars ended with status {self._process.wait()}")
        answered = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(constraint).encode() + b"\n")
            self._process.stdin.flush()
            answered = self._process.stdout.readline()
        if not answered:
            self._again()
        return bool(answered)

    def _again(self) -> None:
        self._end()
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", __name__, *self._words]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )  # a Ctrl-C is not for it
        self._end = weakref.finalize(self, end, self._process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:  # closes its pipes and waits
        pass


def limit(megabytes: int, seconds: int) -> None:
    """What this process may take from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    with contextlib.suppress(OSError):  # no /proc: the processor's limit alone has to do
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        most = data + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def serve(file: str, vocab_size: str, *eos_token_ids: str) -> None:
    """Says a line when it is ready for a grammar, which comes in one, and another when it has survived it."""
    from jqserve.engine.constraint import build, load_tokenizer
    from jqserve.errors import RequestError

    tokenizer = load_tokenizer(Path(file), int(vocab_size), list(map(int, eos_token_ids)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # last words are of no interest
    while line := sys.stdin.readline():
        kind, text = json.loads(line)
        limit(MEGABYTES, SECONDS)
        with contextlib.suppress(RequestError):
            build(tokenizer, (kind, text))
        print("survived\nready", flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK)
    thread = threading.Thread(target=serve, args=sys.argv[1:])
    thread.start()
    thread.join()
