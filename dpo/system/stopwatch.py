"""Where the time of a run goes, by the host's clock."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Seconds on the host's clock by activity, not counting the activities nested inside it.

    A GPU works through a queue, so the host's time goes where it reads a result: see docs/report.md.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.nested = 0.0  # seconds of the activities nested in the one that is being timed

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Time an activity."""
        outer_nested = self.nested
        self.nested = 0.0
        start = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self.seconds[activity] += elapsed - self.nested
            self.nested = outer_nested + elapsed

    def waiting(self, activity: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count the time spent waiting for each as an activity."""
        iterator, end = iter(items), object()
        while True:
            with self(activity):
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]  # end is no item

    def pop(self) -> dict[str, float]:
        """The seconds since the last call, as metrics."""
        metrics = {f"seconds/{activity}": seconds for activity, seconds in self.seconds.items()}
        self.seconds.clear()
        return metrics
