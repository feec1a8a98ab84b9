"""Where the time goes, by a clock that the tests move."""

from types import SimpleNamespace

import pytest

from dpo.system.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """Return a clock whose `now` the tests set."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dpo.system.stopwatch.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_an_activity_has_no_time_of_those_inside_it(clock):
    """Seconds 0 to 10 outside, of which 2 to 5 and 6 to 7 inside, and of these 3 to 4 innermost."""
    watch = Stopwatch()
    with watch("outer"):
        clock.now = 2.0
        with watch("inner"):
            clock.now = 3.0
            with watch("innermost"):
                clock.now = 4.0
            clock.now = 5.0
        clock.now = 6.0
        with watch("inner"):
            clock.now = 7.0
        clock.now = 10.0
    assert watch.pop() == {"seconds/innermost": 1.0, "seconds/inner": 3.0, "seconds/outer": 6.0}
    assert watch.pop() == {}


def test_activities_after_each_other_add_up_and_a_failed_one_counts(clock):
    watch = Stopwatch()
    for start in (0.0, 10.0):
        clock.now = start
        with pytest.raises(ValueError), watch("failing"):
            clock.now = start + 2
            raise ValueError
    with watch("next"):
        clock.now += 5
    assert watch.pop() == {"seconds/failing": 4.0, "seconds/next": 5.0}


def test_waiting_for_items_is_counted_and_what_is_done_with_them_is_not(clock):
    def slow():
        for item in (1, None, 3):
            clock.now += 2
            yield item

    watch, got = Stopwatch(), []
    for item in watch.waiting("data", slow()):
        clock.now += 10
        got.append(item)
    assert got == [1, None, 3] and watch.pop() == {"seconds/data": 6.0}
