"""A collector of spans that is away is told of once, and once more when it is back; serving does not notice."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger("jqserve.server")

#: the SDK's own loggers: with no collector they say two lines or more every ten seconds, for as long as there are spans
NOISY = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.trace.export",  # which says it in older ones
)


class Outage(logging.Filter):
    """A SpanExporter in front of `exporter`, and a filter of what the SDK logs about it, until `close`."""

    def __init__(self, exporter: Any, endpoint: str) -> None:
        super().__init__()
        self.away = False  # since the first complaint, until spans are taken again
        self._exporter, self._endpoint = exporter, endpoint
        for name in NOISY:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """The first complaint becomes a warning of ours; none is printed as it is."""
        if not self.away:
            self.away = True
            log.warning(
                "--otlp-traces-endpoint %s takes no spans: they are lost until it does, serving goes on (%s)",
                self._endpoint,
                record.getMessage(),
            )
        return False

    def export(self, spans: Any) -> Any:
        """Of SpanExporter: blocks the processor's thread for up to the exporter's time-out (10 s)."""
        result = self._exporter.export(spans)
        if self.away and result.name == "SUCCESS":
            self.away = False
            log.info("--otlp-traces-endpoint %s takes spans again", self._endpoint)
        return result

    def shutdown(self) -> None:
        self.away = True  # nothing that is said from now on is news
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))

    def close(self) -> None:
        for name in NOISY:
            logging.getLogger(name).removeFilter(self)
