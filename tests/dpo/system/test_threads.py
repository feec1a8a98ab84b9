"""Whether fewer threads would be faster, decided from timings that are given; no test here times anything itself."""

import pytest
import torch

from dpo.system import threads
from dpo.system.devices import device_name
from dpo.system.threads import ROUNDS, ThreadCheck, fewer_threads, halvings, set_threads, time_products

CPU = torch.device("cpu")
ADVICE = (
    "Advice: 1 thread is 4.0 times as fast as the 2 of this run; other processes seem to use the same cores. To "
    "switch, stop the run and start it again: OMP_NUM_THREADS=1 python train.py resume=RUN (numbers may "
    "round differently). To keep the numbers, set OMP_WAIT_POLICY=PASSIVE instead, which is slightly slower.\n"
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Let the environment set no number of threads."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """Stand for torch's number of threads, 8 at first, and return the list of those that were set."""
    chosen = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    return chosen


@pytest.mark.parametrize("n, expected", [(1, [1]), (2, [2, 1]), (6, [6, 3, 1]), (16, [16, 8, 4, 2, 1])])
def test_the_numbers_of_threads_that_are_compared_are_halved_down_to_1(n, expected):
    assert halvings(n) == expected


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ({2: [4.0] * 5, 1: [1.0] * 5}, (1, 4.0)),
        ({2: [1.5] * 5, 1: [1.0] * 5}, (1, 1.5)),
        ({2: [1.4] * 5, 1: [1.0] * 5}, None),
        ({2: [0.5] * 5, 1: [1.0] * 5}, None),
        ({8: [9.0] * 5, 4: [2.0] * 5, 2: [3.0] * 5, 1: [6.0] * 5}, (4, 4.5)),
        ({2: [0.5, 0.5, 99.0, 0.5, 99.0], 1: [1.0] * 5}, None),  # two moments of other work
        ({2: [4.0] * 5, 1: [1.0, 99.0, 1.0, 99.0, 1.0]}, (1, 4.0)),
    ],
)
def test_a_number_of_threads_is_advised_whose_median_is_clearly_smaller(seconds, expected):
    assert fewer_threads(seconds) == expected


def check(seconds, timed):
    """Return a check of the numbers of threads in seconds, which each take these; it notes in timed what it times."""

    def time_with(n):
        timed.append(n)
        return seconds[n]

    return ThreadCheck(list(seconds), time_with, "resume=RUN")


def test_advice_is_printed_once_after_timings_in_turn_after_the_first_updates(capsys):
    timed = []
    found = check({2: 4.0, 1: 1.0}, timed)
    for _ in range(ROUNDS - 1):
        found.after_update()
    assert capsys.readouterr().out == ""
    found.after_update()
    assert timed == [2, 1] * ROUNDS and capsys.readouterr().out == ADVICE
    found.after_update()
    assert len(timed) == 2 * ROUNDS and capsys.readouterr().out == ""


def test_nothing_is_printed_where_all_threads_are_the_fastest(capsys):
    found = check({2: 0.7, 1: 1.0}, [])
    for _ in range(2 * ROUNDS):
        found.after_update()
    assert capsys.readouterr().out == ""


def test_one_thread_is_not_timed():
    timed = []
    check({1: 1.0}, timed).after_update()
    assert timed == []


def test_the_advice_names_the_variable_that_torch_reads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("MKL_NUM_THREADS", "8")
    text = threads.advice(8, 4, 2.0, "...")
    assert text.startswith("Advice: 4 threads are 2.0 times as fast as the 8 of this run")
    assert " MKL_NUM_THREADS=4 python train.py ... (" in text


@pytest.mark.parametrize(
    "device, has_openmp, expected", [("cpu", True, [8, 4, 2, 1]), ("cuda", True, []), ("cpu", False, [])]
)
def test_threads_are_compared_on_a_cpu_where_their_number_can_change(
    device, has_openmp, expected, machine, monkeypatch
):
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: has_openmp)
    found = ThreadCheck.of(4, torch.float32, torch.device(device), None)
    assert list(found.seconds) == expected


def test_a_timing_uses_as_many_threads_as_asked_and_then_those_of_before(machine):
    state = torch.get_rng_state()
    assert time_products(2, 4, torch.bfloat16) > 0
    assert machine == [8, 2, 8] and torch.equal(torch.get_rng_state(), state)


def test_the_number_of_threads_is_that_of_before_when_a_timing_fails(machine, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        time_products(2, 4, torch.float32)
    assert machine == [8, 2, 8]


def recorded(n, device=None):
    return {"threads": n, "device": device or device_name(CPU)}


@pytest.mark.parametrize(
    "stored, expected",
    [
        ({}, 8),
        (recorded(2), 2),
        (recorded(8), 8),
        (recorded(64), 8),  # more than this machine has
        (recorded(2, "cpu OTHER"), 8),  # whose numbers are not repeated here anyway
        (recorded(0), 8),
        (recorded("2"), 8),
        (recorded(True), 8),
    ],
)
def test_a_resumed_run_computes_with_the_threads_of_its_checkpoint(stored, expected, machine, capsys):
    set_threads(CPU, stored)
    line = "Number of threads: 2, as before the stop; OMP_NUM_THREADS=8 uses all cores.\n"
    assert machine == [8, expected] and capsys.readouterr().out == (line if expected == 2 else "")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_environment_sets_the_threads_of_a_resumed_run(name, machine, monkeypatch, capsys):
    monkeypatch.setenv(name, "8")
    set_threads(CPU, recorded(2))
    assert machine == [8, 8] and capsys.readouterr().out == ""


def test_an_empty_variable_sets_nothing(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    set_threads(CPU, recorded(2))
    assert machine == [8, 2]


def test_the_threads_of_a_host_with_a_gpu_are_left_alone(machine):
    set_threads(torch.device("cuda"), recorded(2))
    assert machine == [8]
