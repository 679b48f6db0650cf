# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What `/metrics` tells, by prometheus-client."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Counts since the start of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind: Any, name: str, what: str, **options: Any) -> Any:
            return kind(f"mdm_asr_{name}", what, registry=self.registry, **options)

        self.requests = make(Counter, "requests", "Requests answered.", labelnames=("route", "status"))
        self.request_s = make(
            Histogram,
            "request_seconds",
            "Seconds from a request's headers to the end of its answer.",
            labelnames=("route",),
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
        )
        self.running = make(Gauge, "requests_running", "Requests and live streams now.")
        self.queue = make(Gauge, "windows_waiting", "Windows of audio that wait to be decoded.")
        self.batches = make(
            Histogram, "batch_windows", "Windows decoded together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.audio_s = make(Counter, "audio_seconds", "Seconds of audio decoded.")
        self.decoding_s = make(Counter, "decoding_seconds", "Seconds spent on decoding it.")
        self.evaluations = make(Counter, "evaluations", "Decoder evaluations (NFE), of each text its own.")
        self.tokens = make(Counter, "tokens", "Tokens written.")
        ratios = (
            ("rtfx", "Seconds of audio decoded in a second.", self.audio_s, self.decoding_s),
            ("tokens_per_evaluation", "Tokens written in a decoder evaluation.", self.tokens, self.evaluations),
        )
        for name, what, over, under in ratios:
            make(Gauge, name, what).set_function(lambda over=over, under=under: _value(over) / (_value(under) or 1.0))

    def note_batch(self, windows: Sequence[Any], results: Sequence[Any], seconds: float) -> None:
        """A batch of windows, with what was decoded of each, or its error."""
        self.batches.observe(len(windows))
        self.decoding_s.inc(seconds)
        self.audio_s.inc(sum(window.duration_s for window in windows))
        decoded = [one for one in results if not isinstance(one, Exception)]
        self.evaluations.inc(sum(one.nfe for one in decoded))
        # With the end of a text, which is a token, too.
        self.tokens.inc(sum(len(one.pieces) + (not one.is_full) for one in decoded if one.nfe))

    def note_live(self, seconds: float, update: Any) -> None:
        """An update of a live stream, of so many seconds of audio more than the one before."""
        self.audio_s.inc(seconds)
        self.decoding_s.inc(update.latency_s)


def _value(counter: Counter) -> float:
    return next(sample.value for metric in counter.collect() for sample in metric.samples)
