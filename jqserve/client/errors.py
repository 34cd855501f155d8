"""A status from the server as an exception."""

from __future__ import annotations

import grpc

from jqserve.errors import JqserveError

FIELD_METADATA = "jqserve-field"

#: what gRPC says of a connection that was not made -> what it means
MEANINGS = (
    ("WRONG_VERSION_NUMBER", "the server does not speak TLS on this port"),
    ("certificate has expired", "the server's certificate has expired"),
    ("certificate is not yet valid", "the server's certificate is not valid yet"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not signed by the authority that this client trusts"),
    ("Hostname Verification", "the server's certificate is for another name; Tls(server_name=...) expects that one"),
    ("Socket closed", "the server hung up: it wants TLS, or a certificate of this client that it trusts (mTLS)"),
    (
        "Connection reset by peer",
        "the server hung up: it wants TLS, or a certificate of this client that it trusts (mTLS)",
    ),
    ("Connection refused", "nothing listens there"),
)


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
    if code is grpc.StatusCode.UNAVAILABLE and details and details.startswith("failed to connect"):
        meaning = next((text for words, text in MEANINGS if words in details), "")
        details = f"{meaning} ({details})" if meaning else details
    field = next((value for key, value in trailing or () if key == FIELD_METADATA), "")
    return ServerError(code, details or "", field if isinstance(field, str) else field.decode())
