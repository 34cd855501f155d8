"""A status from the server as an exception."""

from __future__ import annotations

import grpc

from jqserve.errors import JqserveError

FIELD_METADATA = "jqserve-field"


class ServerError(JqserveError):
    """`code` is gRPC's, `details` the server's text, `field` the request field at fault (INVALID_ARGUMENT only)."""

    def __init__(self, code: grpc.StatusCode, details: str, field: str = "") -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.field = field


def from_rpc(error: grpc.RpcError) -> ServerError:
    """From what grpc raises, sync or aio."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = error.details() if hasattr(error, "details") else str(error)
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    field = next((value for key, value in trailing or () if key == FIELD_METADATA), "")
    return ServerError(code, details or "", field if isinstance(field, str) else field.decode())
