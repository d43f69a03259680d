"""Numbers for Prometheus, under vLLM's names with a prefix of our own: counters and histograms, no averages."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.engine import ServingEngine, Ticket
from serving.sequence import Update

PREFIX = "nanogpt_tripy"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What ``/metrics`` tells."""

    def __init__(self, engine: ServingEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", what, registry=self.registry, buckets=_SECONDS)

        self._first_token = histogram("time_to_first_token_seconds", "From a request's arrival to its first token")
        self._between = histogram("inter_token_latency_seconds", "From one token to the next")
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end")
        self._queue = histogram("request_queue_time_seconds", "From a request's arrival to its first step")
        self._prefill = histogram("request_prefill_time_seconds", "From a request's first step to its first token")
        self._decode = histogram("request_decode_time_seconds", "From a request's first token to its end")
        self._last: dict[tuple[Ticket, int], float] = {}

    def observe(self, ticket: Ticket, update: Update) -> None:
        """What a step has brought one answer."""
        now, answer = time.perf_counter(), (ticket, update.choice)
        if update.ids:
            if answer in self._last:
                each = (now - self._last[answer]) / len(update.ids)
                for _ in update.ids:
                    self._between.observe(each)
            else:
                self._first_token.observe(now - ticket.arrived)
            self._last[answer] = now
        if update.finish_reason is not None:
            self._last.pop(answer, None)
            if ticket.is_finished and ticket.finished and update.finish_reason in ("stop", "length"):
                self._whole.observe(ticket.finished - ticket.arrived)
                self._queue.observe(ticket.started - ticket.arrived)
                if ticket.first_token:
                    self._prefill.observe(ticket.first_token - ticket.started)
                    self._decode.observe(ticket.finished - ticket.first_token)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """What the engine counts by itself, read when it is asked for."""

    def __init__(self, engine: ServingEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counters = self._engine, self._engine.counters
        pages = engine.pages
        gauges = {
            "num_requests_running": ("Answers that are computed", len(engine.scheduler.running)),
            "num_requests_waiting": ("Answers that wait", engine.waiting),
            "kv_cache_usage_perc": ("Share of the pages that sequences hold, 0 to 1", pages.used / pages.count),
            "kv_cache_pages_used": ("Pages that sequences hold", pages.used),
            "kv_cache_pages": ("Pages that there are", pages.count),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", what, value)
        counts = {
            "prefix_cache_queries": ("Tokens of prompts that were looked for in pages", pages.queried),
            "prefix_cache_hits": ("Tokens of prompts that were found in pages", pages.hit),
            "num_preemptions": ("Times that a sequence was put aside", engine.scheduler.preemptions),
            "request_accepted": ("Answers that were asked for and not refused", counters.accepted),
            "prompt_tokens": ("Tokens of prompts that were computed", counters.prompt_tokens),
            "generation_tokens": ("Tokens that were generated", counters.generated_tokens),
            "spec_decode_num_draft_tokens": ("Tokens that were guessed", counters.drafted_tokens),
            "spec_decode_num_accepted_tokens": ("Guesses that were right", counters.accepted_tokens),
            "steps": ("Steps of the model", counters.steps),
        }
        for name, (what, value) in counts.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", what, value)
        finished = CounterMetricFamily(
            f"{PREFIX}_request_success", "Answers that have ended", labels=["finished_reason"]
        )
        for reason, value in sorted(dict(counters.finished).items()):
            finished.add_metric([reason], value)
        yield finished
