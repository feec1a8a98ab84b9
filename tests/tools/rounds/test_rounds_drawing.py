"""Drawing what is missing of a file of samples: after a failure, and on several devices."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import TINY, validated
from transformers import AutoTokenizer

from dpo.system.errors import UserError
from tools.candidates import Candidate
from tools.rounds import devices
from tools.rounds.devices import devices_of
from tools.rounds.drawing import Drawing, read_samples
from tools.rounds.engines import BuiltinEngine, Engine
from tools.rounds.policies import Policy
from tools.rounds.records import Prompt, Sample
from tools.rounds.store import Shards


class Broken(Engine):
    """Fails after n samples; rejects all of them if is_wrong."""

    n: float = math.inf
    is_wrong: bool = False

    def batches(self, tasks):
        return [[task] for task in tasks]

    @contextmanager
    def opened(self, policy, device) -> Iterator:
        def draw(batches):
            for i, (task,) in enumerate(batches):
                if i == self.n:
                    raise UserError("engine: broke")
                yield Sample(task.id, task.prompt.id, task.index, f"text {task.seed}", [1, 2], True)

        yield draw

    def check(self, samples, logps):
        if self.is_wrong:
            raise UserError("engine: another model")


@pytest.fixture
def drawing(tmp_path) -> Drawing:
    settings, loss = validated("loss=dpo", *TINY, "max_length=40", "max_prompt_length=24")
    tokenizer = AutoTokenizer.from_pretrained(settings.model.name_or_path)
    policy = Policy(Candidate("first", settings, loss, None), tokenizer, [], tmp_path / "model")
    prompts = [Prompt(i, text, text, tokenizer(text)["input_ids"]) for i, text in enumerate(("Hi", "Ho", "Hello you"))]
    return Drawing(Broken(), policy, prompts, 4, "round-1", tmp_path / "samples.jsonl")


def changed(drawing: Drawing, engine: Engine) -> Drawing:
    return Drawing(engine, drawing.policy, drawing.prompts, drawing.n, drawing.name, drawing.path)


def test_samples_are_written_in_the_order_of_prompts_and_indices_and_counted(drawing):
    assert drawing.run() == {"samples": 12, "tokens": 24, "unfinished": 0}
    assert [(one.prompt, one.index) for one in read_samples(drawing.path)] == [
        (i, j) for i in range(3) for j in range(4)
    ]


@pytest.mark.parametrize("n", [0, 3, 8, 11])
def test_what_an_engine_gave_before_it_failed_is_kept_and_the_rest_is_asked_for_again(drawing, n):
    with pytest.raises(UserError, match="engine: broke"):
        changed(drawing, Broken(n=n)).run()
    assert len(Shards(drawing.path).rows) == n and not drawing.path.exists()
    with pytest.raises(UserError, match="engine: broke"):
        changed(drawing, Broken(n=0)).run()
    drawing.run()
    assert len(read_samples(drawing.path)) == 12


def test_samples_of_another_model_are_refused_and_the_message_says_where_they_are(drawing):
    with pytest.raises(
        UserError, match=r"engine: another model; resumed rounds keep .* unless you remove .*samples-\*"
    ):
        changed(drawing, Broken(is_wrong=True)).run()
    assert not drawing.path.exists()


def test_a_seed_depends_on_the_seed_of_the_run_the_name_the_prompt_and_the_index(drawing):
    seeds = {task.seed for task in drawing.tasks()}
    assert len(seeds) == 12
    other = Drawing(drawing.engine, drawing.policy, drawing.prompts, 4, "round-2", drawing.path)
    assert not seeds & {task.seed for task in other.tasks()}


def test_two_processes_draw_the_same_samples_as_one(drawing, monkeypatch):
    alone = changed(drawing, BuiltinEngine(batch_size=4))
    alone.run()
    expected = alone.path.read_bytes()
    alone.path.unlink()
    monkeypatch.setattr(devices, "devices_of", lambda settings: ["cpu", "cpu"])
    monkeypatch.setattr(devices, "get_context", lambda method: get_context("fork"))  # need not import everything again
    alone.run()
    assert alone.path.read_bytes() == expected
    assert sorted(path.name for path in Path(alone.path.parent).glob("*.jsonl")) == ["samples.jsonl"]


def test_there_is_a_device_for_each_process_that_trains():
    settings = validated("loss=dpo", *TINY)[0]
    assert devices_of(settings) == ["cpu"]
    sharded = validated("loss=dpo", *TINY, "trainer=FSDPTrainer", "n_processes=2")[0]
    assert devices_of(sharded) == ["cpu", "cpu"]
