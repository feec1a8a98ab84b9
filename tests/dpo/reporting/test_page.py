"""A run as one page, and the pairs that are likely mislabelled."""

import json
import math
import random
import re

import pytest
import yaml
from conftest import golden_rows

from dpo.reporting.figures import COLORS, MEANINGS
from dpo.reporting.findings import Finding, Rule
from dpo.reporting.page import (
    Curve,
    RunFiles,
    Suspect,
    first_words,
    last_words,
    line_of,
    page,
    render,
    run_files,
    suspects,
    update_report,
)
from dpo.reporting.stopping import Cause, Stop
from dpo.system.errors import UserError

SETTINGS = {"exp_name": "first", "lr": 1e-3, "loss": {"name": "dpo", "beta": 0.1}}


def record(examples, **metrics):
    return {"examples": examples, "updates": examples // 8} | {
        name.replace("__", "/"): v for name, v in metrics.items()
    }


def evaluated(examples, margins):
    """Return the lines of pairs.jsonl of one evaluation, a row per margin."""
    return [
        {"examples": examples, "source": "mine", "row": row, "rewards/margins": margin, "lengths/chosen": 9.0 + row,
         "lengths/rejected": 7.0, "log_ratios/chosen": margin, "log_ratios/rejected": -margin}
        for row, margin in enumerate(margins)
    ]  # fmt: skip


def write_run(folder, settings=SETTINGS, samples=()):
    """Write the files of a run that a report reads."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    evaluation = {"loss__eval": 0.4, "rewards_eval__accuracies": 0.75, "rewards_eval__margins": 0.5}
    evaluation |= {"diagnosis__accuracy_low": 0.41, "diagnosis__accuracy_high": 0.93, "diagnosis__displaced": 0.25}
    evaluation |= {"diagnosis__kl": 3.0, "diagnosis__kl_stderr": 0.5}
    metrics = [record(n, loss__train=loss, grad_norm=3.0, lr=1e-3) for n, loss in ((8, 0.69), (16, 0.5))]
    metrics.append(record(16, **evaluation))
    lines = {
        "metrics": metrics,
        "samples": samples,
        "pairs": evaluated(0, [0, 0, 0]) + evaluated(16, [0.5, -0.2, -0.9]),
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFiles(folder)


def test_rewards_of_rows_with_a_label_are_drawn(tmp_path):
    run = write_run(tmp_path / "run")
    assert "undesirable" not in page([run])
    with open(run.path / "metrics.jsonl", "a") as file:
        for n in (16, 24):
            file.write(json.dumps(record(n, rewards_eval__desirable=0.1, rewards_eval__undesirable=-0.1)) + "\n")
    text = page([RunFiles(run.path)])
    assert "desirable" in text and "undesirable" in text


def sample(model, text, examples=16, prompt="Hi"):
    return {"examples": examples, "model": model, "prompt": prompt, "sample": text}


def tiles(text):
    """Return the tiles of a page as {label: number}; what follows a label's first comma is small."""
    found = re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>(?:<small>(.*?)</small>)?', text)
    return {", ".join(filter(None, label)): value for value, *label in found}


def charts(text):
    """Return the titles of a page's charts."""
    return re.findall(r'<svg[^>]* aria-label="([^"]*)"', text)


def add_records(run, *records):
    """Append records to a run's metrics; return the run."""
    with open(run.path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in records)
    return RunFiles(run.path)


KL = "KL from the reference, nats per response"


def test_the_page_shows_the_newest_figures_with_their_interval(tmp_path):
    """1.96 * 0.5 = 0.98 on each side of the KL."""
    run = write_run(tmp_path / "run")
    evaluated = {
        "Loss, evaluation": "0.4",
        "Reward accuracy, evaluation, 95% interval 41% to 93%": "75%",
        "Reward margin, evaluation": "0.5",
        "Displaced chosen responses, evaluation": "25%",
        f"{KL}, samples, 95% interval 2.02 to 3.98": "3",
    }
    assert tiles(page([run])) == {"examples": "16", "updates": "2", **evaluated}
    shown = tiles(page([add_records(run, record(24, loss__train=0.45))]))
    assert shown["examples"] == "24" and shown["Loss, evaluation, after 16 examples"] == "0.4"
    assert len(shown) == 2 + len(evaluated) and all("after 16 examples" in label for label in list(shown)[:-2])


def test_what_a_run_recorded_once_is_a_number_and_no_chart(tmp_path):
    """The loss has two updates beside its one evaluation, which is a point of the chart. Nothing is shown twice."""
    run = write_run(tmp_path / "run")
    once = {"rewards_eval__chosen": 0.2, "rewards_eval__rejected": -0.3, "diagnosis__entropy_per_token": 1.5}
    text = page([add_records(run, record(16, **once))])
    assert charts(text)[:3] == ["Loss", "Gradient norm", "Learning rate"]
    assert set(charts(text)[3:]) == {"Log-ratios to the reference (nats)", "Margin and length"}
    assert list(tiles(text).items())[7:] == [  # after the large ones, examples and updates
        ("Rewards, evaluation, chosen", "0.2"),
        ("Rewards, evaluation, rejected", "-0.3"),
        ("Entropy of the policy, nats per token, samples", "1.5"),
    ]
    run = add_records(run, record(24, **once))
    assert {"Rewards, evaluation", "Entropy of the policy, nats per token"} <= set(charts(page([run])))


def test_a_run_of_one_update_is_all_numbers(tmp_path):
    run = write_run(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text(json.dumps(record(8, loss__train=0.69, grad_norm=3.0, lr=1e-7)) + "\n")
    (run.path / "pairs.jsonl").write_text("")
    text = page([RunFiles(run.path)])
    assert charts(text) == [] and "<h2>Curves" not in text
    assert tiles(text) == {
        "examples": "8",
        "updates": "1",
        "Loss, train": "0.69",
        "Gradient norm, before clipping": "3",
        "Learning rate": "1e-07",
    }


def test_values_that_are_not_finite_are_left_out(tmp_path):
    """metrics.jsonl has null for them. Of the KL one value is left, of the margin none."""
    run = write_run(tmp_path / "run")
    bad = {"rewards_eval__margins": None, "diagnosis__kl": None, "diagnosis__chosen_log_ratio_per_token": None}
    (run.path / "metrics.jsonl").write_text("")
    run = add_records(run, record(8, diagnosis__kl=2.0), record(16, loss__eval=0.4, diagnosis__displaced=0.9, **bad))
    text = page([run])
    assert charts(text) == ["Log-ratios to the reference (nats)", "Margin and length"]
    assert tiles(text) == {
        "examples": "16",
        "updates": "2",
        "Loss, evaluation": "0.4",
        "Displaced chosen responses, evaluation": "90%",
        f"{KL}, samples, after 8 examples": "2",
    }


def test_several_runs_have_points_beside_curves_and_a_number_for_each_where_none_has_a_curve(tmp_path):
    """Both have one evaluation; then the second has another. Of the loss the updates are drawn until then."""
    runs = [write_run(tmp_path / name, {**SETTINGS, "exp_name": name}) for name in ("first", "second")]
    text = page(runs)
    assert ">first, train<" in text and ">second, evaluation<" in text and KL not in charts(text)
    shown = tiles(text)
    assert shown["runs"] == "2" and [label for label in shown if label.startswith("KL")] == [
        f"{KL}, {name}, samples, 95% interval 2.02 to 3.98" for name in ("first", "second")
    ]
    runs[1] = add_records(runs[1], record(24, loss__eval=0.3, diagnosis__kl=4.0))
    text = page(runs)
    assert {"Loss", KL} <= set(charts(text)) and not any(label.startswith(("KL", "Loss")) for label in tiles(text))
    assert ">first, evaluation<" in text and ">first, train<" not in text


def test_runs_of_one_name_are_told_apart_by_their_folders_or_their_paths(tmp_path):
    samples = [{"examples": 16, "model": "policy", "prompt": "Hi", "sample": "x"}]
    (tmp_path / "sub").mkdir()
    runs = [write_run(tmp_path / name, samples=samples) for name in ("one", "other", "sub/one")]
    text = page(runs[:2])
    assert "<title>one, other</title>" in text and "Samples of one<" in text and "Samples of other<" in text
    shown = [label for label in tiles(text) if label.startswith(KL)]
    assert [label.removeprefix(f"{KL}, ").partition(", samples")[0] for label in shown] == ["one", "other"]
    assert f"Samples of {tmp_path / 'sub' / 'one'}<" in page(runs)


def test_pairs_that_are_alike_make_no_chart(tmp_path):
    """At the first evaluation all margins are 0; and responses of one length show nothing of length."""
    run = write_run(tmp_path / "run")
    (run.path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in evaluated(0, [0, 0, 0])))
    text = page([RunFiles(run.path)])
    assert "Margin and length" not in charts(text) and "Evaluation pairs" not in text
    alike = [pair | {"lengths/chosen": 9.0} for pair in evaluated(16, [1, 2, 3])]
    (run.path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in alike))
    assert charts(page([RunFiles(run.path)]))[-1] == "Log-ratios to the reference (nats)"


def test_curves_have_the_intervals_that_were_recorded(tmp_path):
    """Wilson's of the accuracy; 1.96 standard errors of others; none where one of the values has no error."""
    run = write_run(tmp_path / "run")
    assert line_of(run, Curve("", "rewards_eval/accuracies")).band == ([0.41], [0.93])
    low, high = line_of(run, Curve("", "diagnosis/kl")).band
    assert (low, high) == (pytest.approx([2.02]), pytest.approx([3.98]))
    assert line_of(run, Curve("", "diagnosis/displaced")).band is None
    run = add_records(run, record(24, diagnosis__kl=4.0))
    assert line_of(run, Curve("", "diagnosis/kl")).band is None


def test_the_page_needs_no_network_and_runs_no_script(tmp_path):
    text = page([write_run(tmp_path / "run", samples=[sample("policy", "<script>alert(1)</script> & so on")])])
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in text
    assert not re.findall(r"<(?:link|img|iframe)|\bsrc=|@import|url\((?!#)", text)
    assert len(text) < 1_000_000


def test_the_newest_sample_stands_first_beside_the_reference_and_earlier_ones_are_folded(tmp_path):
    texts = [sample(model, f"{model} {n}", n) for n in (0, 8, 16) for model in ("policy", "reference")]
    text = page([write_run(tmp_path / "run", samples=texts)])
    shown, folded = text[text.index("<h2>Samples</h2>") :].split("<summary>2 earlier</summary>")
    found = [re.findall(r"<h4>(.*?)</h4>\s*<pre>(.*?)</pre>", part) for part in (shown, folded)]
    assert found == [
        [("policy after 16 examples", "policy 16"), ("reference", "reference 16")],
        [("policy after 8 examples", "policy 8"), ("policy after 0 examples", "policy 0")],
    ]


def test_a_prompt_is_called_by_its_last_words_none_of_them_cut(tmp_path):
    """The last 100 characters begin within a word."""
    prompt = "First words. " + "abcdefg " * 20
    text = page([write_run(tmp_path / "run", samples=[sample("policy", "x", prompt=prompt), sample("policy", "y")])])
    headings = re.findall(r"<summary>(.*?)</summary>", text)
    assert headings[:2] == ["\N{HORIZONTAL ELLIPSIS} " + " ".join(["abcdefg"] * 12), "Hi"]
    assert text.count("First words.") == 1  # in full below its heading; a prompt that is not cut is not repeated
    assert last_words("one two", 3) == "\N{HORIZONTAL ELLIPSIS} two" and last_words("one two", 7) == "one two"
    assert first_words("one two", 5) == "one \N{HORIZONTAL ELLIPSIS}" and last_words("x" * 9, 3)[1:] == "xxx"


def test_all_but_five_prompts_are_folded(tmp_path):
    texts = [sample("policy", "x", prompt=f"prompt {i}") for i in range(7)]
    text = page([write_run(tmp_path / "run", samples=texts)])
    assert "<summary>2 more prompts</summary>" in text and len(re.findall("<summary>prompt", text)) == 7


@pytest.mark.parametrize("setting, is_bad", [("stop_if.max_loss", True), ("stop_after", False)])
def test_a_page_says_why_an_evaluation_ended_the_run_and_which_checkpoint_is_left(setting, is_bad, tmp_path):
    run = write_run(tmp_path / "run")
    Stop(16, 2, 8, [Cause(setting, 2, "loss/eval", 0.4, 0.3)]).write(run.path)
    html = page([run])
    assert f"The run was ended by its evaluation after 16 examples: {setting}=2: loss/eval is 0.4, the " in html
    assert ("LATEST is step-8, the last good checkpoint." in html) == is_bad
    assert ("A condition of stop_if ended the run." in html) == is_bad


def test_verdict_warnings_and_findings_come_first(tmp_path):
    rule = Rule(
        "length exploitation", lambda figures: None, "the data prefer long texts", "loss.length=x", "2403.19159"
    )
    text = render(
        title="A run",
        verdict="It learned. Accuracy 75% <of 8>.",
        warnings=["only 8 pairs"],
        findings=[Finding(rule, "the margin grows with the length (0.9)")],
        headlines={"Reward accuracy, evaluation": "75%"},
    )
    parts = ("It learned. Accuracy 75% &lt;of 8&gt;.", "only 8 pairs", "Length exploitation:</b> the margin grows with")
    parts += ("Usual cause: the data prefer long texts. Try loss.length=x.", "(2403.19159)", 'class="tile"')
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_what_a_run_warned_of_at_its_start_is_repeated(tmp_path):
    run = write_run(tmp_path / "run")
    (run.path / "warnings.json").write_text('["the warmup is longer than the run"]')
    assert "<b>Warning:</b> the warmup is longer than the run" in page([RunFiles(run.path)])


def lines_by_chart(monkeypatch, runs):
    """Return the lines and the level of each chart of a page."""
    drawn = {}
    monkeypatch.setattr(
        "dpo.reporting.figures.line_chart",
        lambda title, lines, scale, level: drawn.update({title: (lines, level)}) or "",
    )
    page(runs)
    return drawn


def test_a_colour_means_the_same_in_all_charts_and_of_several_runs_the_run(tmp_path, monkeypatch):
    """What has one colour differs by its dashes or its points too."""
    more = {
        "rewards_eval__margins": 0.2,
        "diagnosis__kl": 3.0,
        "diagnosis__kl_stderr": 0.5,
        "rewards_train__margins": 0,
    }
    for side in ("chosen", "rejected"):
        more |= {f"rewards_eval__{side}": 0.1, f"diagnosis__{side}_log_ratio_per_token": 0.1}
    names = ("first", "second")
    runs = [write_run(tmp_path / name, {**SETTINGS, "exp_name": name}) for name in names]
    runs = [add_records(run, record(16, **more), record(24, loss__eval=0.3, **more)) for run in runs]
    charts = [lines for lines, _ in lines_by_chart(monkeypatch, runs[:1]).values()]
    meanings = {(line.label, line.color, line.dashed) for lines in charts for line in lines}
    labels = {label for label, *_ in meanings}
    assert {"train", "evaluation", "chosen", "rejected", "samples"} < labels and len(meanings) == len(labels)
    assert all(color == MEANINGS[label] for label, color, _ in meanings if label in MEANINGS)
    assert {label for label, _, dashed in meanings if dashed} == {"rejected"}
    charts = [lines for lines, _ in lines_by_chart(monkeypatch, runs).values()]
    of_runs = {(line.label.partition(",")[0], line.color) for lines in charts for line in lines}
    assert of_runs == {("first", COLORS[0]), ("second", COLORS[1])}


def test_a_loss_that_starts_at_log_2_has_a_line_there_and_accuracies_one_at_one_half(tmp_path, monkeypatch):
    for first, level in ((math.log(2), (math.log(2), "log 2 = 0.693")), (0.5, None)):
        run = write_run(tmp_path / f"run{first}")
        lines = (run.path / "metrics.jsonl").read_text()
        start = record(0, loss__eval=first, rewards_eval__accuracies=0.0)
        (run.path / "metrics.jsonl").write_text(json.dumps(start) + "\n" + lines)
        drawn = lines_by_chart(monkeypatch, [RunFiles(run.path)])
        assert drawn["Loss"][1] == level and drawn["Reward accuracy"][1] == (0.5, "50%")


def test_each_curve_and_each_axis_has_the_values_that_it_is_labelled_with(tmp_path, monkeypatch):
    """At numbers of examples; pairs are those of the newest evaluation, and lengths chosen minus rejected.

    What is recorded after 16 examples comes again after 24, so that it is a curve.
    """
    curves, points = {}, {}
    monkeypatch.setattr(
        "dpo.reporting.figures.line_chart", lambda title, lines, scale, level: curves.update({title: lines}) or ""
    )
    monkeypatch.setattr(
        "dpo.reporting.figures.scatter_chart",
        lambda title, pairs, *labels, **how: points.update({title: (pairs, *labels)}) or "",
    )
    run = write_run(tmp_path / "run")
    sides = ("rewards_eval__chosen", "rewards_eval__rejected")
    ratios = [f"diagnosis__{side}_log_ratio_per_token" for side in ("chosen", "rejected")]
    accuracy = {"rewards_train__accuracies": 0.5, "rewards_train__margins": 0.25}
    for more in ({sides[0]: 0.1, sides[1]: -0.1}, {ratios[0]: -0.01, ratios[1]: -0.2}, accuracy):
        run = add_records(run, record(16, **more), record(24, **{name: 2 * value for name, value in more.items()}))
    page([add_records(run, record(24, diagnosis__displaced=0.75))])
    drawn = {title: {line.label: (line.x, line.y) for line in lines} for title, lines in curves.items()}
    assert drawn["Loss"] == {"train": ([8, 16], [0.69, 0.5]), "evaluation": ([16], [0.4])}
    assert drawn["Reward accuracy"] == {"train": ([16, 24], [0.5, 1.0]), "evaluation": ([16], [0.75])}
    assert drawn["Reward margin"] == {"train": ([16, 24], [0.25, 0.5]), "evaluation": ([16], [0.5])}
    rewards = {"chosen": ([16, 24], [0.1, 0.2]), "rejected": ([16, 24], [-0.1, -0.2])}
    assert drawn["Rewards, evaluation"] == rewards
    per_token = drawn["Log-ratio to the reference per token, evaluation"]
    assert per_token == {"chosen": ([16, 24], [-0.01, -0.02]), "rejected": ([16, 24], [-0.2, -0.4])}
    share = drawn["Displaced chosen responses"]
    assert share == {"evaluation": ([16, 24], [0.25, 0.75])}
    assert points["Log-ratios to the reference (nats)"] == (
        [(0.5, -0.5), (-0.2, 0.2), (-0.9, 0.9)],
        *("chosen response", "rejected response"),
    )
    assert points["Margin and length"] == (
        [(2.0, 0.5), (3.0, -0.2), (4.0, -0.9)],
        *("tokens, chosen minus rejected", "reward margin"),
    )


def test_several_runs_are_laid_over_each_other_and_only_settings_that_differ_are_listed(tmp_path):
    other = {**SETTINGS, "exp_name": "second", "loss": {"name": "dpo", "beta": 0.5}}
    text = page([write_run(tmp_path / "one"), write_run(tmp_path / "other", other)])
    listed = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', text)
    assert listed == [("exp_name", "first", "second"), ("loss.beta", "0.1", "0.5")]
    assert ">first, evaluation<" in text and ">second, evaluation<" in text


def test_a_pair_is_suspect_if_its_margin_was_negative_at_every_evaluation_after_an_update():
    pairs = evaluated(0, [-9, -9, -9, -9]) + evaluated(8, [-1, -1, 1, 0]) + evaluated(16, [-3, 1, -1, -1])
    assert suspects(pairs) == [Suspect("mine", "0", -2.0)]
    assert suspects(evaluated(8, [-1, -3])) == [Suspect("mine", "1", -3.0), Suspect("mine", "0", -1.0)]
    assert suspects(evaluated(0, [-1])) == []
    unknown = [pair | {"rewards/margins": "nan"} for pair in evaluated(16, [0])]  # as pairs.jsonl writes it
    assert suspects(evaluated(8, [-1]) + unknown) == []


def test_suspects_are_shown_with_the_texts_that_the_first_evaluation_recorded(tmp_path):
    run = write_run(tmp_path / "run")
    assert suspects(run.pairs)[0].texts is None and "row 2: mean margin -0.9" in page([run])  # of an earlier version
    texts = {"prompt": "P" * 400 + " the end", "chosen": "good <b>", "rejected": "bad " * 200}
    pairs = [pair | texts for pair in evaluated(0, [0, 0, 0])] + evaluated(16, [0.5, -0.2, -0.9])
    (run.path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    text = page([RunFiles(run.path)])
    found = text[text.index("Pairs with likely wrong labels") :]
    assert found.startswith("Pairs with likely wrong labels</h2>\n<p>2 evaluated pairs have a negative margin")
    assert found.count("\N{HORIZONTAL ELLIPSIS} the end") == found.count("good &lt;b&gt;") == 2
    assert found.count("bad") == 2 * 150  # 600 characters of each


def test_the_texts_of_twenty_suspects_are_shown(tmp_path):
    run = write_run(tmp_path / "run")
    texts = {"prompt": "p" * 10_000, "chosen": "c" * 10_000, "rejected": "r" * 10_000}
    pairs = [pair | texts for pair in evaluated(16, [-1.0] * 40)]
    (run.path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    text = page([RunFiles(run.path)])
    assert text.count(": mean margin") == 20 and len(text) < 300_000


def test_settings_that_differ_from_their_defaults_come_first_and_the_others_are_folded(tmp_path):
    settings = {**SETTINGS, "batch_size": 4, "model": {"name_or_path": "gpt2", "add_bos": False}, "report": False}
    text = page([write_run(tmp_path / "run", settings)])
    first, folded = text[text.index("<h2>Settings that differ from the defaults") :].split("<details>")
    rows = [dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', part)) for part in (first, folded)]
    own = {"exp_name": "first", "lr": "0.001", "loss.name": "dpo", "model.name_or_path": "gpt2", "report": "false"}
    assert rows == [own, {"loss.beta": "0.1", "batch_size": "4", "model.add_bos": "false"}]
    assert "<summary><h2>Other settings</h2></summary>" in folded


def test_settings_are_shown_as_they_are_stored(tmp_path, monkeypatch):
    """No resolver has to be there, as for model=tiny, and no foreign file can show a secret."""
    monkeypatch.setenv("SECRET", "hunter2")
    model = {"name_or_path": "${project_dir:config/tiny}", "archive": "${oc.env:SECRET}"}
    text = page([write_run(tmp_path / "run", {**SETTINGS, "model": model})])
    assert "${project_dir:config/tiny}" in text and "${oc.env:SECRET}" in text and "hunter2" not in text


def test_pairs_of_one_row_are_told_apart():
    """Row 7 has three pairs, of which the second alone is negative at both evaluations."""
    one_row = [
        pair | {"row": 7, "pair": 100 + i} for n in (8, 16) for i, pair in enumerate(evaluated(n, [1.0, -1.0, 8.0 - n]))
    ]
    one_row[3:] = one_row[:2:-1]  # another token budget, another order
    assert suspects(one_row + evaluated(16, [-4.0])) == [Suspect("mine", "0", -4.0), Suspect("mine", "7, pair 2", -1.0)]


def test_flipped_labels_of_held_out_pairs_are_suspects(make_trainer, tmp_path, report):
    """A tenth of the labels is flipped, of the pairs that are trained on too; what is preferred can be learned."""
    flipped = set()
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = golden_rows(split)
        wrong = set(random.Random(0).sample(range(len(rows)), len(rows) // 10))
        lines = [{"chosen": r["rejected"], "rejected": r["chosen"]} if i in wrong else r for i, r in enumerate(rows)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        flipped = {i + 1 for i in wrong}  # rows are counted from 1
    settings = ("n_eval_examples=40", "eval_every=80", "lr=3e-4", "warmup_steps=5", "debug=true")
    trainer = make_trainer("loss=dpo", f"datasets=['{tmp_path / 'data'}']", *settings)
    trainer.train()
    found = {int(suspect.place) for suspect in suspects(RunFiles(trainer.run.path).pairs)}
    precision, recall = (len(found & flipped) / max(1, len(group)) for group in (found, flipped))
    report(f"--suspects, 4 of 40 labels flipped: precision {precision:.2f}, recall {recall:.2f}")
    assert len(flipped) == 4 and precision >= 0.75 and recall >= 0.75


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        run_files(tmp_path)


def test_texts_may_hold_any_line_end_of_unicode(tmp_path):
    record = {"prompt": "one\u2028two\u0085three"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert RunFiles(tmp_path).samples == [record]


def test_a_record_that_is_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"examples": 24, "upd')
    assert [row["examples"] for row in RunFiles(run.path).metrics] == [8, 16, 16]


def test_a_report_that_cannot_be_written_is_one_line_and_stops_nothing(tmp_path, capsys):
    update_report(tmp_path / "nowhere")
    assert re.fullmatch(r"report\.html was not written \(.*\)\n", capsys.readouterr().out)


def test_a_run_writes_its_report_at_each_evaluation_unless_it_is_switched_off(make_trainer):
    settings = ("loss=dpo", "n_examples=16", "n_eval_examples=8", "eval_every=8", "debug=true")
    trainer = make_trainer(*settings, "report=true")
    trainer.evaluate_and_save()
    first = (trainer.run.path / "report.html").read_text()
    trainer.train()
    assert "<b>16</b><span>examples</span>" in (trainer.run.path / "report.html").read_text() != first
    evaluations = [json.loads(line)["examples"] for line in (trainer.run.path / "pairs.jsonl").read_text().splitlines()]
    assert sorted(set(evaluations)) == [0, 8, 16]
    silent = make_trainer(*settings)
    silent.evaluate_and_save()
    assert not (silent.run.path / "report.html").exists()
