"""What /metrics tells Prometheus; all names begin with megatron_lowbit_."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from megatron_lowbit.adapters import patching
from megatron_lowbit.launch.engines.base import Engine
from megatron_lowbit.launch.server.scheduler import Scheduler

_PREFIX = "megatron_lowbit_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counts requests, and reads the rest where it is kept."""

    def __init__(self, engine: Engine, scheduler: Scheduler):
        self.engine, self.scheduler = engine, scheduler
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{_PREFIX}requests", "Requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            f"{_PREFIX}time_to_first_token_seconds",
            "From a request to its first token, the wait included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            f"{_PREFIX}request_seconds", "From a request to its last token", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(self)

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield what is read now; called by the registry."""
        scheduler, seen = self.scheduler, self.scheduler.saturation
        sent = sum(traffic.bytes for traffic in patching.site_traffic(self.engine.model).values())
        yield _counter("prompt_tokens", "Tokens of prompts that were run", scheduler.prompted)
        yield _counter("generated_tokens", "Tokens generated", scheduler.generated)
        yield _gauge("queue_length", "Sequences that wait for their turn", len(scheduler.waiting))
        yield _gauge("running_sequences", "Sequences that are generated", len(scheduler.running))
        yield _counter("wire_bytes", "Bytes that rank 0 handed to low-bit collectives, each message once", sent)
        yield _counter("encoded_values", "Values that low-bit formats encoded, on all ranks", seen.get("values", 0))
        yield _counter(
            "saturated_values", "Those of them beyond their calibrated range, or NaN", seen.get("saturated", 0)
        )
        yield _counter("nonfinite_tokens", "Tokens sent as NaN", seen.get("nonfinite_tokens", 0))
        yield _gauge(
            "bf16_sites", "Row-parallel linears that fell back to bf16 collectives", len(seen.get("bf16_sites", ()))
        )

    def describe(self) -> list[Any]:
        """Return nothing: the registry would collect to learn the names."""
        return []


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"{_PREFIX}{name}", what, value=value)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}{name}", what, value=value)
