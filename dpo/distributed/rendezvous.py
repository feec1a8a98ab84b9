"""How ranks find each other in a store that an earlier start of the same job has used."""

import json
import time
import uuid

from torch.distributed.distributed_c10d import Store

from dpo.system.errors import RunError

POLL_INTERVAL = 0.05  # seconds


def agree_on_start(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """A name for this start: the same on all ranks, and different from earlier starts in the store.

    torchrun's store outlives restarts, and torchrun's restart count differs between machines: a machine that lost a
    process counts a restart, the others only see that the members have changed. So rank 0 names the start. Every other
    rank answers with an identifier, and accepts the name once rank 0 has listed that identifier under it. RunError
    after timeout seconds.
    """
    identifier = uuid.uuid4().hex
    end = time.monotonic() + timeout
    if rank == 0:
        store.set("start", identifier)
        others = [store.get(f"{identifier}/{other}").decode() for other in range(1, world_size)]  # waits for them
        store.set(f"{identifier}/all", json.dumps(others))
        return identifier
    while time.monotonic() < end:
        start = store.get("start").decode() if store.check(["start"]) else None
        if start is not None:
            store.set(f"{start}/{rank}", identifier)
            if store.check([f"{start}/all"]) and identifier in json.loads(store.get(f"{start}/all")):
                return start
        time.sleep(POLL_INTERVAL)
    raise RunError(f"rank {rank}: the other ranks did not join within {timeout:.0f} s", "rank")
