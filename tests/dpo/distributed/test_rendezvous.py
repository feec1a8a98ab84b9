"""Ranks that start again in a store which their earlier start has used, by threads and a store in this process."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ranks import make_store
from torch.distributed import HashStore, TCPStore

from dpo.distributed.rendezvous import agree_on_start
from dpo.system.errors import RunError


def start(port: int, delays: list[float]) -> list[str]:
    """Return the name that each rank of a start gets, of which each begins after some seconds."""

    def one(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_start(TCPStore("127.0.0.1", port, is_master=False), rank, len(delays), timeout=60)

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(one, range(len(delays))))


def test_each_start_in_one_store_has_a_name_of_its_own_whichever_rank_comes_first():
    store = make_store()
    names = [start(store.port, delays) for delays in ([0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.3, 0.0])]
    assert all(len(set(of_ranks)) == 1 for of_ranks in names)
    assert len({of_ranks[0] for of_ranks in names}) == 3


def test_a_rank_that_stays_alone_ends():
    store = HashStore()
    assert agree_on_start(store, 0, 1, timeout=1) == store.get("start").decode()
    with pytest.raises(RunError, match="rank 1: the other ranks did not join within 0 s") as failed:
        agree_on_start(store, 1, 2, timeout=0.2)
    assert failed.value.exit_code == 7
