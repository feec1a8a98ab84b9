"""How the ranks of one start find each other in a store that an earlier start has used."""

import json
import time
import uuid

from torch.distributed.distributed_c10d import Store

from dpo.system.errors import RunError

INTERVAL = 0.05  # seconds between two looks into the store


def agree_on_start(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """Return a name of this start, the same on all ranks, which no earlier start in the same store had.

    torchrun's store outlives its restarts, and its count of them is not the same on all machines: where a machine lost
    a process, others only see that the members have changed. So rank 0 names the start, each other rank answers with an
    identifier of its own, and takes the name of a start whose list of identifiers has it. RunError after timeout
    seconds.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        store.set("start", own)
        others = [store.get(f"{own}/{other}").decode() for other in range(1, world_size)]  # waits for them
        store.set(f"{own}/all", json.dumps(others))
        return own
    while time.monotonic() < end:
        start = store.get("start").decode() if store.check(["start"]) else None
        if start is not None:
            store.set(f"{start}/{rank}", own)
            if store.check([f"{start}/all"]) and own in json.loads(store.get(f"{start}/all")):
                return start
        time.sleep(INTERVAL)
    raise RunError(f"rank {rank}: the other ranks were not there after {timeout:.0f} s", "rank")
