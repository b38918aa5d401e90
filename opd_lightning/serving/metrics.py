"""Counters of a server, in the text format that Prometheus reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """What a server has done since it started. The numbers change; one thread writes each of them."""

    answers: Counter[int] = field(default_factory=Counter)
    """Requests to ``/score`` by HTTP status."""
    tokens: int = 0
    """Tokens scored, prompts included."""
    batches: int = 0
    """Passes over the model; of several requests each, where they wait together."""
    together: int = 0
    """Requests that those served."""
    busy: float = 0.0
    """Seconds spent in them."""
    received: int = 0
    """Bytes of requests."""
    sent: int = 0
    """Bytes of answers."""

    def text(self, waiting: int, held: int) -> str:
        """Return all of them, with the requests that wait and the bytes that are held for requests now."""
        lines = [
            "# HELP opd_teacher_requests_total Scoring requests answered, by HTTP status.",
            "# TYPE opd_teacher_requests_total counter",
            *(f'opd_teacher_requests_total{{status="{s}"}} {n}' for s, n in sorted(self.answers.items())),
        ]
        numbers: list[tuple[str, str, str, float]] = [
            ("tokens_total", "counter", "Tokens scored, prompts included.", self.tokens),
            ("batches_total", "counter", "Groups of requests scored together.", self.batches),
            ("batched_requests_total", "counter", "Requests in those groups.", self.together),
            ("busy_seconds_total", "counter", "Seconds spent scoring.", self.busy),
            ("received_bytes_total", "counter", "Bytes of scoring requests.", self.received),
            ("sent_bytes_total", "counter", "Bytes of their answers.", self.sent),
            ("waiting_requests", "gauge", "Requests that wait to be scored.", waiting),
            ("held_bytes", "gauge", "Bytes held for requests and answers now.", held),
        ]
        for name, kind, meaning, value in numbers:
            full = f"opd_teacher_{name}"
            lines += [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}", f"{full} {value}"]
        return "\n".join(lines) + "\n"
