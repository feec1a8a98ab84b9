"""Where the time of a run goes, by the host's clock."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Seconds of the host's clock by activity, each without those of the activities inside it.

    On a GPU, whose work is queued, the host waits where it reads a result: see docs/report.md.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = 0.0  # seconds of the activities inside the one that is being timed

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time inside this context as that of an activity."""
        outer, self.inner, start = self.inner, 0.0, time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self.seconds[activity] += elapsed - self.inner
            self.inner = outer + elapsed

    def waiting(self, activity: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, counting the time until each is there as that of an activity."""
        iterator, end = iter(items), object()
        while True:
            with self(activity):
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]  # end is no item

    def take(self) -> dict[str, float]:
        """Return the seconds since they were last taken, as metrics."""
        taken = {f"seconds/{activity}": seconds for activity, seconds in self.seconds.items()}
        self.seconds.clear()
        return taken
