"""What Prometheus sees: SGLang's metric names with the prefix `jqserve:`, and what only this server can tell.

Nothing is computed per token: the engine's numbers are read from its last `EngineStats` when somebody scrapes.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from jqserve.server.generation import Generation
from jqserve.server.histogram import Histogram
from jqserve.server.sequence import Finished

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from jqserve.server.frontend import Frontend

log = logging.getLogger("jqserve.server")

PREFIX = "jqserve:"
FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.6, 1, 2, 4, 6, 8, 10, 20, 40, 60, 120, 300)
BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.05, 0.1, 0.2, 0.4, 0.8, 1, 2, 5, 10, 20, 40, 60, 100, 200, 400, 800)
LENGTHS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
FLUSHES = (1, 2, 3, 4, 6, 8, 16, 32, 64)

#: our name without the prefix -> (help, from EngineStats and the front end)
GAUGES: dict[str, tuple[str, Callable[[Frontend], float]]] = {
    "num_running_reqs": ("Sequences that run.", lambda f: f.stats.running),
    "num_queue_reqs": ("Sequences that wait.", lambda f: f.stats.waiting),
    "num_used_tokens": ("Tokens that the used KV pages hold.", lambda f: f.stats.pages_used * f.page_size),
    "max_total_num_tokens": ("Tokens that all KV pages hold.", lambda f: f.stats.pages_total * f.page_size),
    "token_usage": ("Share of the KV pages in use.", lambda f: f.stats.pages_used / max(1, f.stats.pages_total)),
    "gen_throughput": ("Generated tokens per second, lately.", lambda f: f.throughput),
    "cache_hit_rate": ("Share of prompt tokens found in the prefix cache.", lambda f: f.cache_hit_rate),
    "free_pages": ("KV pages that nobody uses.", lambda f: f.stats.pages_total - f.stats.pages_used),
    "cached_pages": ("Free KV pages that still hold a prefix.", lambda f: f.stats.pages_cached),
    "mean_batch": ("Sequences in a step, on average since the start.", lambda f: f.stats.mean_batch),
    "streams": (
        "Generate calls that are being answered.",
        lambda f: sum(not generation.scored for generation in list(f.generations.values())),
    ),
    "tasks": ("Tasks of the front end's event loop.", lambda f: f.tasks),
    "ready": ("1 while requests are served.", lambda f: float(f.is_ready)),
}
COUNTERS: dict[str, tuple[str, Callable[[Frontend], float]]] = {
    "generation_tokens": ("Generated tokens.", lambda f: f.stats.generated_tokens),
    "preemptions": ("Sequences that gave their pages back to be recomputed.", lambda f: f.stats.preemptions),
    "recompilations": ("Programs compiled after the warm-up: a fault.", lambda f: f.stats.compilations_after_warmup),
    "steps": ("Steps of the engine.", lambda f: f.stats.steps),
    "evictions": ("Pages of cached prefixes that were taken for something else.", lambda f: f.stats.evictions),
    "cached_tokens": ("Prompt tokens found in the prefix cache.", lambda f: f.stats.cached_tokens),
}


class Metrics:
    """Counts what the front end does; a `prometheus_client` collector of everything."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self.first_token = Histogram(
            PREFIX + "time_to_first_token_seconds", "From request to first token.", FIRST_TOKEN
        )
        self.between = Histogram(PREFIX + "inter_token_latency_seconds", "From token to token, as sent.", BETWEEN)
        self.whole = Histogram(PREFIX + "e2e_request_latency_seconds", "From request to the end.", WHOLE)
        self.prompts = Histogram(PREFIX + "prompt_tokens_histogram", "Tokens of a prompt.", LENGTHS)
        self.answers = Histogram(PREFIX + "generation_tokens_histogram", "Tokens of an answer.", LENGTHS)
        self.flushes = Histogram(PREFIX + "stream_flush_tokens", "Tokens sent in one message.", FLUSHES)
        self.rpcs: collections.Counter[tuple[str, str]] = collections.Counter()
        self._finishes: collections.Counter[str] = collections.Counter()
        self._prompt_tokens = self._requests = self._aborted = 0
        self._scored_sequences = self._scored_tokens = 0

    def rpc(self, method: str, code: str) -> None:
        self.rpcs[method, code] += 1

    def started(self, generation: Generation) -> None:
        """A Generate call, or a sequence of a Score call, was admitted."""
        if generation.scored:
            self._scored_sequences += 1
            self._scored_tokens += generation.prompt_tokens
            return
        self._requests += 1
        self._prompt_tokens += generation.prompt_tokens
        self.prompts.observe(generation.prompt_tokens)

    def flushed(self, tokens: int, seconds: float | None) -> None:
        """A message with `tokens` new ones, `seconds` after the one before it (None: it holds the first token)."""
        self.flushes.observe(tokens)
        if seconds is not None:
            self.between.observe(seconds / tokens, tokens)

    def finished(self, item: Finished, generation: Generation) -> None:
        """A sequence has ended by itself."""
        if generation.scored:
            return
        self._finishes[item.reason.name.lower()] += 1
        self.answers.observe(item.completion_tokens)
        self.whole.observe(item.total_seconds)
        if item.completion_tokens:
            self.first_token.observe(item.first_token_seconds)

    def ended(self, generation: Generation, tokens: int) -> None:
        """A Generate call is over, with or without the ends of its sequences."""
        if not generation.scored and any(sequence.finish is None for sequence in generation.sequences):
            self._aborted += 1

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        frontend = self._frontend
        labels, values = ["model_name"], [frontend.config.name]

        def counter(name: str, help_text: str, samples: Iterable[tuple[list[str], float]], *more: str) -> Metric:
            family = CounterMetricFamily(PREFIX + name, help_text, labels=[*labels, *more])
            for extra, value in samples:
                family.add_metric([*values, *extra], value)
            return family

        for name, (help_text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, help_text, labels=labels)
            gauge.add_metric(values, read(frontend))
            yield gauge
        for name, (help_text, read) in COUNTERS.items():
            yield counter(name, help_text, [([], read(frontend))])
        yield counter("num_requests", "Generate calls that were admitted.", [([], self._requests)])
        yield counter("num_aborted_requests", "Those that ended before their sequences did.", [([], self._aborted)])
        yield counter("prompt_tokens", "Tokens of admitted prompts.", [([], self._prompt_tokens)])
        yield counter("scored_sequences", "Sequences of Score calls.", [([], self._scored_sequences)])
        yield counter("scored_tokens", "Their tokens, which prompt_tokens does not count.", [([], self._scored_tokens)])
        finishes = [([reason], float(n)) for reason, n in sorted(self._finishes.items())]
        yield counter("finished_sequences", "Sequences by how they ended.", finishes, "reason")
        rpcs = [([method, code], float(n)) for (method, code), n in sorted(self.rpcs.items())]
        yield counter("grpc_requests", "RPCs by their status.", rpcs, "method", "code")
        phases = [([phase], seconds) for phase, seconds in sorted(frontend.stats.host_seconds.items())]
        yield counter("host_seconds", "Seconds of the engine's host thread by phase.", phases, "phase")
        for histogram in (self.first_token, self.between, self.whole, self.prompts, self.answers, self.flushes):
            yield histogram.family(labels, values)
        yield from self._plan()

    def _plan(self) -> Iterator[Metric]:
        """Which kernel multiplies how many modules and bytes: constant while the server runs."""
        from prometheus_client.core import GaugeMetricFamily

        names = ["model_name", "scheme", "kernel"]
        modules = GaugeMetricFamily(PREFIX + "kernel_plan_modules", "Modules by scheme and kernel.", labels=names)
        size = GaugeMetricFamily(PREFIX + "kernel_plan_bytes", "Bytes of weights by scheme and kernel.", labels=names)
        plan: dict[tuple[str, str], list[int]] = {}
        for row in self._frontend.info.get("plan") or ():
            entry = plan.setdefault((str(row.get("scheme") or ""), str(row.get("kernel") or "unknown")), [0, 0])
            entry[0] += 1
            entry[1] += int(row.get("bytes") or 0)
        for (scheme, kernel), (count, total) in sorted(plan.items()):
            modules.add_metric([self._frontend.config.name, scheme, kernel], count)
            size.add_metric([self._frontend.config.name, scheme, kernel], total)
        yield modules
        yield size
