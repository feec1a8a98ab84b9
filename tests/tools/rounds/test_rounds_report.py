"""The report of the rounds: what it shows of one, two or several, and a line per round for the console."""

import json
import re

import pytest

from tools.rounds.judgement import Judged, judge, read_history, write_judgement
from tools.rounds.records import Sample
from tools.rounds.report import N_PROMPTS, summary_line, write_report

MARKUP = "<script>alert('x')</script> & <b>"
BOUNDS = (0.5, 0.1)  # min_entropy, max_unfinished


def write_rounds(out, n_rounds, n_prompts=4, step=1.0, logp=-8.0):
    """Write the judgements of rounds whose score rises by step and whose KL by 2 nats in each, after round 0."""
    for k in range(n_rounds + 1):
        rows = [
            Judged(
                f"Prompt {i} {MARKUP}",
                Sample(f"{k}/{i}/0", i, 0, f"text {i} of {k} {MARKUP}", [3, 4, 5, 6], finished=i > 0),
                score=i % 4 + step * k,
                win=1.0 if k and i else 0.5,
            )
            for i in range(n_prompts)
        ]
        policy = [logp if k else -8.0] * n_prompts
        logps = {"policy": policy, "first": [x - 2 * k for x in policy], "previous": [x - min(k, 1) for x in policy]}
        write_judgement(out, judge(k, rows, logps, read_history(out)))


def page_of(out):
    write_report(out, *BOUNDS)
    return (out / "report.html").read_text(encoding="utf-8")


def table(text, heading):
    """Return the rows of the table under a heading as {first cell: other cells}."""
    rows = re.findall(r"<tr>(.*?)</tr>", text[text.index(f"<h2>{heading}") :].split("</table>")[0], re.S)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in rows]
    return {first: others for first, *others in cells}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_report_has_the_rounds_side_by_side_and_a_curve_of_each_metric(n, tmp_path):
    write_rounds(tmp_path, n)
    text = page_of(tmp_path)
    found = table(text, "Rounds side by side")
    assert found[""] == [f"round {k}" for k in range(n + 1)]
    # Scores 0, 1, 2, 3: mean 1.5, variance 5 / 3, 1.96 standard errors 1.265; each round adds 1 to every score.
    assert found["score"][:2] == ["1.5 [0.235, 2.77]", "2.5 [1.23, 3.77]"]
    assert found["score minus round 0&#39;s"] == ["", *(f"{k} [{k}, {k}]" for k in range(1, n + 1))]
    assert found["KL to the first policy, nats per response"][-1] == f"{2 * n} [{2 * n}, {2 * n}]"
    assert found["win rate"][:2] == ["", "87.5% [39.6%, 98.7%]"]  # 3.5 of 4
    assert found["samples that finish"][0] == "75.0% [30.1%, 95.4%]"
    charts = re.findall(r'<svg[^>]* aria-label="([^"]*)"', text)
    assert charts[0] == "Score" and charts[-1] == "Score against KL to the first policy" and len(charts) == 8
    frontier = text[text.index('aria-label="Score against KL') :]
    assert all(f">{k}</text>" in frontier for k in range(n + 1))  # the number of each round


def test_the_top_of_the_page_names_the_best_round(tmp_path):
    write_rounds(tmp_path, 2)
    tiles = r'<div class="tile"><b>(.*?)</b><span>(.*?)</span>(?:<small>(.*?)</small>)?'
    assert re.findall(tiles, page_of(tmp_path)) == [
        ("2", "rounds", ""),
        ("2", "best round", ""),
        ("3.5", "score of the best round", "95% interval 2.23 to 4.77"),
        ("87.5%", "win rate of the best round", "95% interval 39.6% to 98.7%"),
    ]


def test_why_the_rounds_stopped_is_said_on_top(tmp_path):
    write_rounds(tmp_path, 1, step=-1.0, logp=-3.0)
    text = page_of(tmp_path)
    found = re.search(r'<p class="verdict">(.*?)</p>', text).group(1)
    assert found.startswith("Stopped: round 1 made the policy worse: its mean score is below that of round 0 by 1,")
    assert "its entropy is 0.75 nats per token" in found and found.endswith("; the best round is 0.")
    assert 'class="verdict"' not in page_of_rising(tmp_path / "other")


def page_of_rising(out):
    write_rounds(out, 1)
    return page_of(out)


def test_each_prompt_has_the_text_of_each_round_with_its_score_the_newest_beside_the_first(tmp_path):
    write_rounds(tmp_path, 3, n_prompts=N_PROMPTS + 1)
    text = page_of(tmp_path)
    headings = re.findall(r"<h4>(round \d: .*?)</h4>", text)
    assert headings[:4] == ["round 3: 3, fails", "round 0: 0, fails", "round 2: 2, fails", "round 1: 1, fails"]
    assert headings[4] == "round 3: 4" and len(headings) == 4 * N_PROMPTS
    assert "text 9 of 1" in text and "text 10 of 1" not in text


def test_markup_in_prompts_and_texts_is_shown_as_text_and_nothing_is_loaded(tmp_path):
    write_rounds(tmp_path, 1)
    text = page_of(tmp_path)
    assert (
        "<script" not in text and "text 0 of 1 &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &lt;b&gt;" in text
    )
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)  # names of SVG's namespaces


def test_the_counts_of_the_stages_are_those_of_the_manifest(tmp_path):
    write_rounds(tmp_path, 1)
    assert "<h2>Stages" not in page_of(tmp_path)
    stages = {"round-1/pairs": {"counts": {"pairs": 12, "ties": 3}, "seconds": 1.5}}
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": stages}))
    assert table(page_of(tmp_path), "Stages") == {"round-1/pairs": ["pairs: 12, ties: 3"]}


def test_one_held_out_prompt_has_values_without_intervals(tmp_path):
    write_rounds(tmp_path, 2, n_prompts=1)
    text = page_of(tmp_path)
    assert table(text, "Rounds side by side")["score"] == ["0", "1", "2"] and "nan" not in text.lower()


def test_a_round_is_summarized_in_a_line(tmp_path):
    write_rounds(tmp_path, 1)
    first, last = map(summary_line, read_history(tmp_path))
    rest = "entropy 2 nats per token, length 4 tokens, 75.0% finish"
    assert first == f"round 0: score 1.5 [0.235, 2.77], KL to the first policy 0 nats per response, {rest}"
    better = "score 2.5 [1.23, 3.77], win rate 87.5% [39.6%, 98.7%]"
    assert last == f"round 1: {better}, KL to the first policy 2 nats per response, {rest}"
