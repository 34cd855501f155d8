"""The errors that reach a user. Each message names the thing, what was found, what is supported, and what to do."""

from __future__ import annotations


class JqserveError(Exception):
    """Base of every error that is the user's to read; the command line prints it without a traceback.

    Names out of a file may hold anything: what a terminal would obey, or could not print, is escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(
            "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)
        )


class CheckpointError(JqserveError):
    """A checkpoint that is damaged, incomplete, or says something that its tensors contradict."""


class UnsupportedError(JqserveError):
    """A well-formed thing that this version does not support: a scheme, an architecture, a flag."""


class RequestError(JqserveError):
    """A request that cannot be served as asked. `field` is the request field at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class QueueFullError(JqserveError):
    """The queue of waiting requests is full; the caller may try again later."""


class EngineUnavailableError(JqserveError):
    """The engine is starting, draining, or gone."""


class ModelNotFoundError(JqserveError):
    """A request for another model than the one served."""


class EngineFailedError(JqserveError):
    """The engine broke under a running request: our fault, not the request's."""


class RequestTimeoutError(JqserveError):
    """A request took longer than the server allows."""


class UnreadStreamError(JqserveError):
    """A caller does not read its stream."""


class PreconditionError(JqserveError):
    """Something cannot be done in the present state: stop a profiler that does not run, for instance."""
