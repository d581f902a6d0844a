"""Counts of an engine's requests, tokens and seconds, as Prometheus takes them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
OUTCOMES = ("stop", "length", "time", "cancelled", "failed", "refused", "full")
RECENT = 0.9  # of the mean seconds of a request, after one more


class Figures:
    """Counts since the engine began; the engine's lock guards them."""

    def __init__(self) -> None:
        self.outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self.prompt_tokens, self.reused_tokens, self.tokens = 0, 0, 0
        self.first = [0] * (len(BUCKETS) + 1)  # requests by the seconds to their first token
        self.seconds_to_first = 0.0
        self.seconds_of_request: float | None = None  # from its beginning to its end, lately

    def first_token(self, seconds: float) -> None:
        """Counts the seconds from a request's arrival to its first token."""
        self.first[bisect_left(BUCKETS, seconds)] += 1
        self.seconds_to_first += seconds

    def ended(self, outcome: str, seconds: float | None = None) -> None:
        """Counts a request that has ended, and the seconds that it ran if it had begun."""
        self.outcomes[outcome] += 1
        if seconds is not None:
            mean = seconds if self.seconds_of_request is None else self.seconds_of_request
            self.seconds_of_request = RECENT * mean + (1 - RECENT) * seconds

    def retry_after(self, rows: int) -> float:
        """Returns in how many seconds one of so many rows should be free; 1 where nothing ended."""
        return 1.0 if self.seconds_of_request is None else self.seconds_of_request / rows

    def lines(self) -> dict[str, float]:
        """Returns all numbers by their names."""
        counts = {f'requests_total{{outcome="{k}"}}': float(n) for k, n in self.outcomes.items()}
        counts |= {
            "prompt_tokens_total": self.prompt_tokens,
            "prompt_tokens_reused_total": self.reused_tokens,
            "generated_tokens_total": self.tokens,
        }
        name, below = "first_token_seconds", 0
        for bound, n in zip((*BUCKETS, "+Inf"), self.first, strict=True):
            below += n
            counts[f'{name}_bucket{{le="{bound}"}}'] = below
        return counts | {f"{name}_sum": self.seconds_to_first, f"{name}_count": below}
