"""metrics.jsonl, samples.jsonl, pairs.jsonl and the console."""

import json
import zlib

import pytest
import torch
from tiny_models import weigh

from dpo.data.examples import TextExample, TokenizedExample
from dpo.reporting.metrics import BatchMetrics, MetricLogger
from dpo.reporting.trackers import Tracker


def test_metrics_are_all_written_although_the_console_is_thinned(tmp_path, capsys):
    logger = MetricLogger(tmp_path, Tracker(), minimum_interval_secs=1000)
    for n in (1, 2, 3):
        logger.log({"examples": n, "updates": n, "loss/train": 0.5}, thin=True)
    logger.log({"examples": 3, "updates": 3, "loss/eval": 0.25})
    logger.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["examples"] == 2
    assert capsys.readouterr().out.splitlines() == [
        "1 examples, 1 updates: loss 0.5",
        "3 examples, 3 updates, evaluation: loss 0.25",
    ]


def drawn(text):
    """Return a sampled text of the prompt p."""
    return TokenizedExample(TextExample("p", (text,), "keep_end", 7, "mine"), [1], ([2],))


class RecordingTracker(Tracker):
    """Keeps what it is given."""

    def __init__(self):
        self.logged, self.tables = [], []

    def log(self, metrics, step):
        self.logged.append((metrics, step))

    def table(self, name, step, columns, rows):
        self.tables.append((name, step, columns, rows))


def test_a_tracker_gets_what_the_console_shows_at_a_step_in_examples(tmp_path):
    tracker = RecordingTracker()
    logger = MetricLogger(tmp_path, tracker, minimum_interval_secs=1000)
    for n in (1, 2):
        logger.log({"examples": 8 * n, "updates": n, "loss/train": 0.5 / n}, thin=True)
    logger.log({"examples": 16, "updates": 2, "loss/eval": 0.25})
    logger.close()
    assert tracker.logged == [({"loss/train": 0.5}, 8), ({"loss/eval": 0.25}, 16)]


def test_samples_are_kept_and_tracked_by_model_at_a_step_in_examples(tmp_path):
    tracker = RecordingTracker()
    logger = MetricLogger(tmp_path, tracker)
    logger.log_samples(8, {"policy": [drawn("one")], "reference": [drawn("other")]})
    logger.close()
    columns = ["step", "prompt", "sample"]
    assert tracker.tables == [
        ("policy_samples", 8, columns, [[8, "p", "one"]]),
        ("reference_samples", 8, columns, [[8, "p", "other"]]),
    ]
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [list(record.values()) for record in records] == [[8, "policy", "p", "one"], [8, "reference", "p", "other"]]


def test_a_metric_of_some_examples_is_their_mean_and_is_left_out_where_no_example_has_it():
    """One pass with a desirable example, 3, and one with two of three, 1 and 2: mean 2, whatever the others."""
    metrics, text = BatchMetrics(), TextExample("p", ("a",), "keep_end", 7, "mine")
    for desirable, n in (([3.0], 1), ([1.0, 2.0], 3)):
        values = {"rewards/desirable": torch.tensor(desirable), "rewards/undesirable": torch.tensor([])}
        metrics.add([TokenizedExample(text, [1], ([2],))] * n, values | {"loss": torch.ones(n)})
    assert metrics.means("train") == {"rewards_train/desirable": 2.0, "loss/train": 1.0}
    assert [row.keys() - {"source", "row", "prompt", "responses"} for row in metrics.rows()] == [{"loss"}] * 4


def one_pair():
    """Return the metrics of one evaluated pair."""
    metrics, text = BatchMetrics(), TextExample("p", ("a", "b"), "keep_end", 7, "mine")
    values = {"rewards/margins": torch.tensor([0.5]), "lengths/chosen": torch.tensor([3.0]), "loss": torch.ones(1)}
    metrics.add([TokenizedExample(text, [1], ([2], [3]))], values)
    return metrics


def test_a_pair_is_logged_with_its_row_rewards_and_lengths_and_once_with_its_texts(tmp_path):
    logger, sft = MetricLogger(tmp_path, Tracker()), BatchMetrics()
    sft.add(one_pair().examples, {"loss": torch.ones(1)})
    logger.log_pairs(0, one_pair())
    logger.log_pairs(8, sft)
    logger.log_pairs(8, one_pair())
    first, second = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert second.pop("pair") == zlib.crc32(b"('a', 'b')")
    assert second == {"examples": 8, "source": "mine", "row": 7, "rewards/margins": 0.5, "lengths/chosen": 3.0}
    assert {name: first[name] for name in first if name not in second} == {
        **{"pair": zlib.crc32(b"('a', 'b')"), "prompt": "p", "chosen": "a", "rejected": "b"}
    }
    logger.cut([0, 0, 0])  # a resumed run repeats its first evaluation
    logger.log_pairs(8, one_pair())
    logger.close()
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["chosen"] == "a"


def test_a_pair_is_logged_with_a_weight_that_is_not_1(tmp_path):
    logger, metrics = MetricLogger(tmp_path, Tracker()), one_pair()
    metrics.examples = [weigh(example, 0.5) for example in metrics.examples]
    logger.log_pairs(8, metrics)
    logger.close()
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["weight"] == 0.5


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "pairs.jsonl"])
@pytest.mark.parametrize("partial", ['{"examples": 3, "upd', "x" * 200_000])
@pytest.mark.parametrize("whole", ["", '{"a": 1}\n', '{"a": 1}\n' * 20_000])
def test_a_record_that_a_kill_cut_is_dropped_and_the_next_one_has_its_own_line(name, whole, partial, tmp_path, capsys):
    (tmp_path / name).write_text(whole + partial)
    logger = MetricLogger(tmp_path, Tracker())
    assert f"{name}: dropped its last record, {len(partial):,} bytes" in capsys.readouterr().out
    logger.log({"examples": 8, "updates": 1})
    logger.log_samples(8, {"policy": [drawn("s")]})
    logger.log_pairs(8, one_pair())
    logger.close()
    written = (tmp_path / name).read_text()
    assert written.startswith(whole)
    (record,) = map(json.loads, written[len(whole) :].splitlines())
    assert record["examples"] == 8


def test_a_log_that_ends_with_its_line_stays(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"examples": 8}\n')
    MetricLogger(tmp_path, Tracker()).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"examples": 8}\n' and capsys.readouterr().out == ""


def test_a_cut_in_the_middle_of_a_record_drops_it(tmp_path, capsys):
    logger = MetricLogger(tmp_path, Tracker())
    for n in (8, 16):
        logger.log({"examples": n, "updates": 1})
    first = len((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) + 1
    logger.cut([first + 5, 0])
    logger.log({"examples": 16, "updates": 2})
    logger.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["updates"] for record in records] == [1, 2]
    assert "dropped its last record, 5 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "pairs.jsonl"])
def test_a_full_disk_names_the_log(name, tmp_path):
    (tmp_path / name).symlink_to("/dev/full")
    logger = MetricLogger(tmp_path, Tracker())
    with pytest.raises(OSError, match="No space left on device") as failure:
        logger.log({"examples": 8, "updates": 1})
        logger.log_samples(8, {"policy": [drawn("s")]})
        logger.log_pairs(8, one_pair())
    assert failure.value.filename == str(tmp_path / name)
    logger.close()  # does not raise it again


def test_samples_are_kept_verbatim(tmp_path):
    sample = "\x1b[31mred\r\nerror: forged\u2028 ☕"
    logger = MetricLogger(tmp_path, Tracker())
    logger.log_samples(8, {"policy": [drawn(sample)]})
    logger.close()
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["sample"] == sample
