"""Work on all cores, in the order of its items."""

import gc
import math
import sys
from itertools import count, islice

import pytest

from dpo.system import processes
from dpo.system.processes import map_on_all_cores, without_garbage_collection


@pytest.fixture(autouse=True)
def always_faster(monkeypatch):
    """Let other processes help with work that is too quick to be measured."""
    monkeypatch.setattr(processes, "FASTER", math.inf)


def square(item):
    if item < 0:
        raise ValueError(f"no root of {item}")
    return item * item


@pytest.mark.parametrize("n_cores", [1, 2])
def test_results_come_in_the_order_of_the_items(n_cores, monkeypatch):
    monkeypatch.setattr(processes, "count_cores", lambda: n_cores)
    for n in (0, 1, 3, 20):
        assert list(map_on_all_cores(square, range(n), 3, "squares")) == [i * i for i in range(n)]


def test_few_items_start_no_process(monkeypatch):
    monkeypatch.setattr(processes, "ProcessPoolExecutor", None)
    assert list(map_on_all_cores(square, range(3), 3, "squares")) == [0, 1, 4]


@pytest.mark.parametrize("seconds, helps", [(1.0, True), (1.9, False)])
def test_processes_start_only_where_the_work_has_not_used_all_cores_by_itself(seconds, helps, monkeypatch):
    """Of 2 cores, the work used one, or nearly both: other processes would need 0.5 or 0.95 of the time."""
    monkeypatch.setattr(processes, "FASTER", 0.7)
    monkeypatch.setattr(processes, "count_cores", lambda: 2)
    monkeypatch.setattr(processes, "ProcessPoolExecutor", None)
    wall, cpu = count(), count(step=seconds)
    monkeypatch.setattr(processes.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(processes.time, "process_time", lambda: next(cpu))
    results = map_on_all_cores(square, range(9), 3, "squares")
    if helps:
        with pytest.raises(TypeError, match="NoneType"):
            list(results)
    else:
        assert list(results) == [i * i for i in range(9)]


def test_an_error_is_raised_at_its_item(monkeypatch):
    monkeypatch.setattr(processes, "count_cores", lambda: 2)
    results = map_on_all_cores(square, [1, 2, 3, -4, 5], 1, "squares")
    assert list(islice(results, 3)) == [1, 4, 9]
    with pytest.raises(ValueError, match="no root of -4"):
        next(results)


def test_items_are_taken_only_shortly_before_they_are_needed(monkeypatch):
    monkeypatch.setattr(processes, "count_cores", lambda: 2)
    items = count()
    results = map_on_all_cores(square, items, 1, "squares")
    assert list(islice(results, 4)) == [0, 1, 4, 9]
    results.close()
    assert next(items) < 12


def test_where_other_processes_cannot_help_one_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(processes, "count_cores", lambda: 2)
    monkeypatch.setattr(processes, "start_process", sys.exit)
    assert list(map_on_all_cores(square, range(20), 1, "squares")) == [i * i for i in range(20)]
    assert "squares: the worker processes were killed, so one process does the rest." in capsys.readouterr().out


def test_garbage_is_collected_again_afterwards():
    with pytest.raises(ValueError, match="why"), without_garbage_collection():
        assert not gc.isenabled()
        raise ValueError("why")
    assert gc.isenabled()
