"""What processes ask of each other, and how they split batches; with the values of the other ranks put in place."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_models import PLENTY, make_examples

from dpo.distributed.process_group import ProcessGroup, SynchronizedSignals, check_same, synchronize
from dpo.distributed.ranks import ALONE, Ranks
from dpo.distributed.splitting import BatchSplitter
from dpo.model.packing import Packer
from dpo.reporting.utilization import memory_use
from dpo.system.errors import Stopped, UserError
from dpo.system.signals import Signals

LENGTHS = [(9, 5, 3), (4, 2, 8), (13, 1, 6), (2, 7, 7), (11, 3, 2)]
PACKER = Packer("shared_prefix", PLENTY, torch.device("cpu"))


def test_a_process_alone_asks_itself():
    assert (ALONE.rank, ALONE.world_size, ALONE.is_main) == (0, 1, True)
    assert ALONE.gather("a") == ALONE.gather_shares("a") == ["a"] and ALONE.run_on_main(lambda: 7) == 7
    assert ALONE.any(torch.tensor(True)) and not ALONE.any(0)
    assert ALONE.keep_first("run", "here") == ("here", False)
    signals = Signals()
    assert synchronize(signals, ALONE) is signals


def test_a_process_alone_computes_every_microbatch_with_its_own_gradient():
    packer = Packer("padded", 40, torch.device("cpu"))
    microbatches = list(BatchSplitter(packer)(make_examples(LENGTHS), 2))
    assert sum(len(one.batch.examples) for one in microbatches) == 5 and len(microbatches) > 2
    assert {scale for _, scale, _ in microbatches} == {1.0} and microbatches[-1].is_last


def exchange(rank: int, n: int, folder: Path) -> None:
    """Write what a rank of n gets."""
    ranks = ProcessGroup(torch.device("cpu"), timedelta(seconds=30))
    examples = make_examples(LENGTHS)
    packer = Packer("shared_prefix", 17, torch.device("cpu"))  # one example per pass, so 2 and 3 passes
    microbatches = BatchSplitter(packer, ranks)(examples)
    passes = [([e.text.row for e in one.batch.examples], one.scale, one.is_last) for one in microbatches]
    found = {
        "passes": passes,
        "a lone example": [scale for _, scale, _ in BatchSplitter(PACKER, ranks)(examples[:1])],
        "gather": ranks.gather(rank),
        "shares": ranks.gather_shares(rank),
        "any": (ranks.any(rank == 1), ranks.any(False)),
        "on main": ranks.run_on_main(lambda: f"from {rank}"),
        "from main": ranks.broadcast_from_main(lambda: [f"made by {rank}"], lambda made: [*made, "sent"]),
        "kept": [ranks.keep_first("name", f"by {rank}"), ranks.keep_first("name", "later")],
        "memory": memory_use(torch.device("cpu"), ranks),
    }
    torch.save(found, folder / f"{rank}.pt")
    ranks.close()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """Return what each of two ranks got."""
    folder = tmp_path_factory.mktemp("exchange")
    run_ranks(2, exchange, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_agree(found):
    for one in found:
        assert one["gather"] == one["shares"] == [0, 1]
        assert one["kept"] == [("by 0", False), ("by 0", True)]
        assert one["any"] == (True, False) and one["on main"] == "from 0"
        assert one["from main"][0] == "made by 0"
        assert one["memory"]["memory_gb/max"] >= one["memory"]["memory_gb/mean"] > 0.05
    assert found[0]["memory"] == found[1]["memory"]
    assert [len(one["from main"]) for one in found] == [1, 2]  # the other rank gets what is sent, the main one its own


def test_ranks_make_as_many_passes_and_one_of_fewer_examples_makes_one_that_counts_for_nothing(found):
    """Tokens 17, 14, 20, 16, 16. Longest first, each to the rank with fewer: 20 | 17, then 16 to 1: 33, 16 to 0: 36,
    14 to 1: 47. So rank 0 has rows 2 and 4, or 2 and 3, of equal length; its third pass repeats the shortest, row 1.
    The loss is scaled by 2, the number of ranks, over which gradients are averaged.
    """
    assert [scale for _, scale, _ in found[0]["passes"]] == [2.0, 2.0, 0.0]
    assert [scale for _, scale, _ in found[1]["passes"]] == [2.0, 2.0, 2.0]
    assert found[0]["passes"][2][0] == [1]
    counted = [row for one in found for rows, scale, _ in one["passes"] if scale for row in rows]
    assert sorted(counted) == [0, 1, 2, 3, 4]
    for one in found:
        assert [is_last for _, _, is_last in one["passes"]] == [False, False, True]


def test_a_rank_without_an_example_still_makes_a_pass(found):
    assert [one["a lone example"] for one in found] == [[2.0], [0.0]]


class Others(Ranks):
    """Ranks of which another one has got what it is given."""

    def __init__(self, *others):
        self.others = list(others)

    def gather(self, value):
        return [value, self.others.pop(0)]


def test_ranks_that_read_other_files_are_refused():
    ranks = Others({"the weights": "a"}, {"the weights": "b"})
    check_same({"the weights": "a"}, ranks)
    with pytest.raises(UserError, match="the weights: not the same on rank 1 as on rank 0"):
        check_same({"the weights": "a"}, ranks)
    check_same({"the weights": "a"}, ALONE)


def test_a_signal_of_another_rank_stops_this_one_too():
    signals = SynchronizedSignals(Signals(), Others((False, None), (False, "SIGTERM")))
    signals.check()
    with pytest.raises(Stopped) as stopped:
        signals.check()
    assert stopped.value.exit_code == 143


def test_a_wish_for_a_checkpoint_that_comes_in_an_evaluation_is_granted_after_it():
    signals = SynchronizedSignals(Signals(), Others((True, None), (False, None), (False, None)))
    signals.check()
    assert signals.pop_save() and not signals.pop_save()


def test_a_signal_between_the_save_and_the_check_waits_for_the_next_update():
    """The run would end without a checkpoint of the update that was just made."""
    signals = SynchronizedSignals(Signals(), Others((False, None), (False, "SIGTERM")))
    assert not signals.pop_save()
    signals.check()
    assert not signals.pop_save() and signals.stop == "SIGTERM"
