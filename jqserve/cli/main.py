"""`jqserve <command>`: the table of commands. A command's module is imported when it is run, and not before.

A command is a module with `add_arguments(parser)` and `run(args) -> int` (the exit status). What a user got wrong is a
JqserveError or an OSError: one line on stderr and status 2, never a traceback.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence

import jqserve
from jqserve.cli.foreign_flags import Parser
from jqserve.errors import JqserveError

#: name -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("jqserve.cli.convert", "write a checkpoint as an Orbax tree with a checked manifest"),
    "eval": ("jqserve.cli.evaluate", "perplexity, divergence from the base, tasks and errors by layer"),
    "gateway": ("jqserve.cli.gateway", "an OpenAI-compatible HTTP endpoint (smg) in front of workers"),
    "generate": ("jqserve.cli.generate", "complete prompts offline, with a progress bar"),
    "quantize": (
        "jqserve.cli.quantize",
        "quantize an unquantized checkpoint, with calibration where the scheme has it",
    ),
    "logits": ("jqserve.cli.logits", "dump the logits of given token ids, to compare engines"),
    "plan": ("jqserve.cli.plan", "what would become of every module, and whether it fits, without a device"),
    "top": ("jqserve.cli.top", "what a running server is doing, in the terminal"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jqserve [--debug] COMMAND ...",
            "",
            "Quantized LLM serving in JAX. The server itself is `jqserve-server`.",
            "",
            *lines,
            "",
            "`jqserve COMMAND --help` tells a command's options; --debug shows the traceback of an error;",
            "`jqserve --version` prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for an internal fault, 2 for the user's, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = words[:1] == ["--debug"]
    words = words[1:] if debug else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"jqserve {jqserve.__version__}")
        return 0
    name, *rest = words
    if name in ("server", "serve"):
        return _fail(
            "jqserve",
            f"the server is a command of its own: jqserve-server{''.join(f' {shlex.quote(word)}' for word in rest)}",
        )
    if name not in COMMANDS:
        return _fail("jqserve", f"unknown command {name!r}; commands: {', '.join(COMMANDS)} (see jqserve --help)")
    module_name, help_line = COMMANDS[name]
    try:
        command = importlib.import_module(module_name)
        parser = Parser(prog=f"jqserve {name}", description=help_line)
        command.add_arguments(parser)
        return int(command.run(parser.parse_args(rest)) or 0)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        if isinstance(error, (JqserveError, OSError)):
            return _fail(f"jqserve {name}", str(error))
        kind = type(error).__name__
        _fail(f"jqserve {name}", f"internal error, {kind}: {error} (jqserve --debug {name} ... shows where)")
        return 1


def _fail(who: str, message: str) -> int:
    print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
