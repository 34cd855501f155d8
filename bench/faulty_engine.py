"""An engine process that breaks now and then, for the soak: `python -m bench.faulty_engine SECONDS --fd N`.

About every SECONDS (drawn, from 0.5 to 1.5 times that) a step raises: when it is dispatched, or when it is read.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

from jqserve.engine import process


class InjectedError(RuntimeError):
    """What a device's failure looks like to the engine."""


def break_now_and_then(seconds: float) -> None:
    from jqserve.engine.runner import Runner

    rng = random.Random(0)
    due = [time.monotonic() + seconds]

    def faulty(method: Any) -> Any:
        def wrapped(self: Runner, *arguments: Any) -> Any:
            if time.monotonic() >= due[0]:
                due[0] = time.monotonic() + seconds * rng.uniform(0.5, 1.5)
                raise InjectedError("injected by the soak")
            return method(self, *arguments)

        return wrapped

    for name in ("launch", "read"):
        setattr(Runner, name, faulty(getattr(Runner, name)))


def main() -> int:
    break_now_and_then(float(sys.argv[1]))
    return process.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
