"""Servers that do not answer."""

import time

from dpo.network import is_reachable


def test_a_server_that_does_not_answer_costs_no_more_than_its_seconds():
    start = time.monotonic()
    assert not is_reachable("http://192.0.2.1", seconds=0.5)
    assert time.monotonic() - start < 3
