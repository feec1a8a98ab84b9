"""Rounds from the command line: their files, a kill at any moment, and what is refused when they are resumed."""

import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import pytest
import torch
from conftest import GOLDENS, ROOT
from faults import Fault, rounds_line, send
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.system import files
from tools.rounds import store
from tools.rounds.store import read_rows

N_PROMPTS, N_SAMPLES = 24, 3
SCORER = """
def share(prompt, response):
    return sum(letter in "eart" for letter in response) / (1 + len(response))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with prompts, a scorer, and a tiny model of which most samples end."""
    folder = tmp_path_factory.mktemp("rounds")
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2")
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    with torch.no_grad():  # adds about 3 to the logit of eos
        eos = model.transformer.wte.weight[tokenizer.eos_token_id]
        model.transformer.ln_f.bias += 3 * eos / eos.square().sum()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = [{"prompt": f"\n\nHuman: Name {i} rivers.\n\nAssistant:"} for i in range(N_PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "score.py").write_text(SCORER)
    return folder


def new(home: Path, out: Path, *overrides: str) -> tuple[str, ...]:
    """Return the arguments of new rounds."""
    return (
        *(f"local_run_dir='{out}'", f"local_dirs=['{home}']", f"model.name_or_path='{home / 'model'}'"),
        *("loss=dpo", "prompts=[prompts.jsonl]", "scorer=score:share", "rounds=2"),
        *(f"samples={N_SAMPLES}", "n_eval_prompts=4", "prompts_per_round=12", "engine.batch_size=16"),
        *("max_length=64", "max_prompt_length=40", "batch_size=2", "lr=1e-7", "warmup_steps=0", "precision=float32"),
        *("device=cpu", "report=false", "wandb.enabled=false", "max_unfinished=1", "background_saves=false"),
        *overrides,
    )


def rounds(home: Path, arguments: tuple[str, ...], *faults: Fault) -> str:
    """Run `python -m tools.rounds ARGUMENTS` in the folder home, and return what it printed; its code comes first."""

    done = rounds_line(home, arguments, *faults)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def contents(out: Path) -> dict[str, object]:
    """Return what rounds with the same settings have in common: the manifest without times, and all rows."""
    manifest = json.loads((out / "manifest.json").read_text())
    for stage in manifest["stages"].values():
        del stage["seconds"], stage["settings"]
        stage["inputs"] = {name.removeprefix(str(out)): value for name, value in stage["inputs"].items()}
    rows = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.glob("round-*/**/*.jsonl"))
        if "run" not in path.parts
    }
    return {"manifest": manifest, **rows}


@pytest.fixture(scope="module")
def finished(home) -> Path:
    """Rounds that were never interrupted."""
    printed = rounds(home, new(home, home / "out"))
    assert printed.startswith("0\n") and "The rounds stop" not in printed, printed
    return home / "out"


def test_each_round_leaves_its_files_and_a_record_of_each_stage(finished):
    stages = json.loads((finished / "manifest.json").read_text())["stages"]
    names = ["prompts", "samples", "scores", "pairs", "training", "judgement/samples", "judgement"]
    assert list(stages) == [
        "prompts",
        *(f"round-0/{name}" for name in names[-2:]),
        *(f"round-{k}/{name}" for k in (1, 2) for name in names),
    ]
    assert all(stage["done"] for stage in stages.values())
    for k in (1, 2):
        folder = finished / f"round-{k}"
        assert len(read_rows(folder / "prompts.jsonl")) == 12
        samples = read_rows(folder / "samples.jsonl")
        assert [(one["prompt"], one["index"]) for one in samples] == [
            (row["id"], index) for row in read_rows(folder / "prompts.jsonl") for index in range(N_SAMPLES)
        ]
        scores = {row["id"]: row["score"] for row in read_rows(folder / "scores.jsonl")}
        assert scores.keys() == {one["id"] for one in samples}
        for row in read_rows(folder / "pairs.jsonl"):
            assert row["score_chosen"] > row["score_rejected"]
        assert (folder / "run" / "LATEST" / "hf" / "model.safetensors").is_file()
    assert (finished / "report.html").is_file()
    assert not list(finished.glob("round-*/samples-*.jsonl"))


def test_pairs_are_trained_on_by_the_token_ids_that_were_sampled(finished):
    ids = {one["id"]: one["ids"] for one in read_rows(finished / "round-1" / "samples.jsonl")}
    for row in read_rows(finished / "round-1" / "pairs.jsonl"):
        assert row["sampled_ids"]["chosen"] in ids.values() and row["sampled_ids"]["rejected"] in ids.values()


def test_each_round_samples_from_the_policy_of_the_round_before(finished):
    inputs = {
        name: stage["inputs"] for name, stage in json.loads((finished / "manifest.json").read_text())["stages"].items()
    }
    (weights,) = [path.resolve() for path in (finished / "round-1" / "run" / "LATEST" / "hf").glob("*.safetensors")]
    assert str(weights.relative_to(finished)) in inputs["round-2/samples"]
    assert str(weights.relative_to(finished)) not in inputs["round-1/samples"]


def test_the_second_round_draws_other_samples_than_the_first(finished):
    texts = [{row["text"] for row in read_rows(finished / f"round-{k}" / "samples.jsonl")} for k in (1, 2)]
    assert len(texts[0] & texts[1]) < len(texts[0]) / 2


def test_rounds_that_are_done_are_not_done_again(finished, home):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("round-*/**/*") if path.is_file()}
    printed = rounds(home, (f"resume='{finished}'",))
    assert printed.startswith("0\n")
    after = {path: path.stat().st_mtime_ns for path in finished.glob("round-*/**/*") if path.is_file()}
    assert after == before


# A kill at any moment


def kill_at(nth: int) -> Fault:
    """Kill the process at the nth time that it writes: rows before they are whole, or a file before it has its name."""
    count = 0

    def due() -> bool:
        nonlocal count
        count += 1
        return count == nth

    def install() -> None:
        to_line, replace = store.to_line, files.os.replace

        def append(self, rows, rank=0):
            if rows and due():
                path = self.path.with_name(f"{self.path.stem}-{rank}.jsonl")
                path.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(map(to_line, rows))
                with open(path, "a") as file:
                    file.write(text[: len(text) - len(text) // 3])
                send(signal.SIGKILL)()
            return original(self, rows, rank)

        def rename(source, target):
            if due():
                send(signal.SIGKILL)()
            return replace(source, target)

        original = store.Shards.append
        store.Shards.append = append
        files.os.replace = rename

    return install


def test_a_kill_while_anything_is_written_changes_nothing(home, finished, tmp_path, counts):
    expected = contents(finished)
    for nth in counts([9], range(1, 60, 3)):
        out = tmp_path / str(nth)
        printed = rounds(home, new(home, out), kill_at(nth))
        if printed.startswith("0\n"):
            break  # it writes less often
        was_training = printed.startswith("7\n") and "training was killed by SIGKILL" in printed
        assert printed.startswith("-9\n") or was_training, printed
        arguments = (f"resume='{out}'",) if (out / "config.yaml").exists() else new(home, out)
        printed = rounds(home, arguments)
        assert printed.startswith("0\n"), printed
        assert contents(out) == expected
        shutil.rmtree(out)


def test_kills_of_all_processes_at_random_moments_change_nothing(home, finished, tmp_path, request, report):
    if not request.config.getoption("--soak"):
        pytest.skip("in make soak")
    expected, rng, moments = contents(finished), random.Random(0), Counter()
    while moments.total() < 20:
        out, n_kills = tmp_path / str(moments.total()), 0
        code = None
        while code is None:
            arguments = (f"resume='{out}'",) if (out / "manifest.json").exists() else new(home, out)
            command = [sys.executable, "-m", "tools.rounds", *arguments]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            with open(tmp_path / "log", "w") as log:
                process = Popen(command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)
                try:
                    code = process.wait(rng.uniform(4, 40) if n_kills < 4 else None)
                except TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    n_kills += 1
                    stages = re.findall(r"^(\S+) \.\.\.$", (tmp_path / "log").read_text(), re.MULTILINE)
                    moments[stages[-1] if stages else "the start"] += 1
        assert code == 0, (tmp_path / "log").read_text()
        assert contents(out) == expected
        shutil.rmtree(out)
    report(f"rounds, killed {moments.total()} times: {dict(moments)}")


# What is refused, and what may change


def copy_of(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out", symlinks=True))


def test_the_same_command_again_names_the_command_that_resumes(finished, home):
    printed = rounds(home, new(home, finished))
    assert printed.startswith("2\n") and f"continue them with `python -m tools.rounds resume={finished}`" in printed


@pytest.mark.parametrize(
    "name", ["round-1/samples.jsonl", "round-2/pairs.jsonl", "round-1/run/LATEST/hf/model.safetensors"]
)
def test_a_file_that_was_changed_is_refused_by_name(finished, home, tmp_path, name):
    out = copy_of(finished, tmp_path)
    path = (out / name).resolve()
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    printed = rounds(home, (f"resume='{out}'",))
    assert printed.startswith("2\n") and f"{path.relative_to(out)} has changed since" in printed


def test_prompts_that_have_changed_are_refused_by_name(finished, home, tmp_path):
    out, prompts = copy_of(finished, tmp_path), home / "prompts.jsonl"
    before = prompts.read_text()
    prompts.write_text(before.replace("Name 3", "Name 33"))
    try:
        printed = rounds(home, (f"resume='{out}'",))
        assert printed.startswith("2\n") and f"prompts={home / 'prompts.jsonl'} has changed since prompts" in printed
    finally:
        prompts.write_text(before)


def test_a_scorer_whose_code_has_changed_is_refused(finished, home, tmp_path):
    out = copy_of(finished, tmp_path)
    (home / "score.py").write_text(SCORER + "\n# changed\n")
    try:
        printed = rounds(home, (f"resume='{out}'", "rounds=3"))
        advice = "scorer has changed since round-0/judgement; restore it, or go on with it: accept_scorer=true"
        assert printed.startswith("2\n") and advice in printed
        printed = rounds(home, (f"resume='{out}'", "accept_scorer=true"))
        assert printed.startswith("0\n") and "round-2/scores: has scores of an earlier version" in printed
    finally:
        (home / "score.py").write_text(SCORER)


def test_rounds_can_be_added_and_other_settings_are_refused(finished, home, tmp_path):
    out = copy_of(finished, tmp_path)
    printed = rounds(home, (f"resume='{out}'", "samples=4"))
    assert printed.startswith("2\n") and "samples=4: resumed rounds keep samples=3" in printed
    printed = rounds(home, (f"resume='{out}'", "rounds=3"))
    assert printed.startswith("0\n"), printed
    assert (out / "round-3" / "judgement.json").is_file()
    assert "rounds: 3\n" in (out / "config.yaml").read_text()  # when they are resumed once more
    assert contents(out)["round-2/samples.jsonl"] == contents(finished)["round-2/samples.jsonl"]


def test_rounds_resume_from_another_folder_and_with_their_changed_settings(finished, home, tmp_path):
    out = copy_of(finished, tmp_path)
    (tmp_path / "score.py").write_text(SCORER)
    for arguments in ((f"resume='{out}'", "min_entropy=0.1"), ("resume=out",)):
        printed = rounds(tmp_path, arguments)
        assert printed.startswith("0\n"), printed
    assert "min_entropy: 0.1\n" in (out / "config.yaml").read_text()


def test_rounds_that_were_moved_while_they_trained_go_on(finished, home, tmp_path):
    out = copy_of(finished, tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    for name in ("round-2/training", "round-2/judgement/samples", "round-2/judgement"):
        del manifest["stages"][name]
    (out / "manifest.json").write_text(json.dumps(manifest))
    config = out / "round-2" / "run" / "config.yaml"
    assert str(finished) in config.read_text()
    config.write_text(config.read_text().replace(str(finished), "/where/it/was"))
    printed = rounds(home, (f"resume='{out}'",))
    assert printed.startswith("0\n"), printed
    assert contents(out) == contents(finished)


def test_rounds_of_which_nothing_is_done_can_be_begun_again_by_the_same_command(home, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    wrong = (*new(home, tmp_path / "out"), f"prompts=['{tmp_path / 'prompts.jsonl'}']")
    for _ in range(2):
        printed = rounds(home, wrong)
        assert printed.startswith("2\n") and "row 1: has no prompt" in printed
    printed = rounds(home, (*new(home, tmp_path / "other"), "scorer=score:shre"))
    assert printed.startswith("2\n") and "the module score has no function shre" in printed
    assert not (tmp_path / "other").exists()


def test_what_names_no_scorer_or_no_prompts_is_refused_before_anything_is_sampled(home, tmp_path):
    printed = rounds(home, (*new(home, tmp_path / "out"), "scorer=score:shares"))
    assert printed == "2\nerror: scorer.function=score:shares: the module score has no function shares\n"
    assert not (tmp_path / "out").exists()
    printed = rounds(home, (*new(home, tmp_path / "out"), "eval_prompts=[nowhere.jsonl]"))
    assert printed.startswith("2\n") and "error: eval_prompts=[nowhere.jsonl]: there is no such file" in printed
    printed = rounds(home, new(home, tmp_path / "new", "reference=nowhere/policy.pt"))
    assert printed.startswith("2\n") and "error: reference=nowhere/policy.pt: there is no such file" in printed
    printed = rounds(home, new(home, tmp_path / "new", "scorer=./nowhere"))
    assert printed.startswith("2\n") and "error: scorer=./nowhere: there is no such folder" in printed
    printed = rounds(home, tuple(part for part in new(home, tmp_path / "new") if not part.startswith("scorer=")))
    assert printed.startswith("2\n") and "error: scorer: is missing; set scorer=VALUE" in printed
    assert not (tmp_path / "new").exists()


def test_a_training_run_is_not_taken_for_rounds(finished, home):
    printed = rounds(home, (f"resume='{finished / 'round-1' / 'run'}'",))
    assert printed.startswith("2\n") and "is a training run; continue it with `python train.py resume=" in printed


def test_a_scorer_that_fails_stops_the_rounds_and_what_it_answered_before_is_kept(home, tmp_path):
    calls = home / "calls.txt"
    (home / "moody.py").write_text(
        "import pathlib\n"
        f"calls = pathlib.Path({str(calls)!r})\n"
        "def score(prompt, response):\n"
        "    with calls.open('a') as file:\n"
        "        file.write(repr(response) + '\\n')\n"
        "    n = len(calls.read_text().splitlines())\n"
        "    if n == 9:\n"
        "        raise ValueError('no idea')\n"
        "    return float('nan') if n == 12 else n % 5\n"
    )
    arguments = (*new(home, tmp_path / "out", "rounds=1"), "scorer=moody:score")
    printed = rounds(home, arguments)
    assert printed.startswith("2\n") and "failed with ValueError: no idea, for the response" in printed
    printed = rounds(home, (f"resume='{tmp_path / 'out'}'",))
    assert printed.startswith("2\n") and "gives nan instead of a finite number" in printed
    printed = rounds(home, (f"resume='{tmp_path / 'out'}'",))
    assert printed.startswith("0\n"), printed
    asked = calls.read_text().splitlines()
    assert len(asked) == len(set(asked)) + 2  # the two that failed are asked again, no other one is


def test_a_round_with_too_few_pairs_is_not_trained_and_what_is_done_is_reported(home, tmp_path):
    (home / "flat.py").write_text("def score(prompt, response):\n    return 1\n")
    printed = rounds(home, (*new(home, tmp_path / "out"), "scorer=flat:score"))
    assert (
        printed.startswith("0\n") and "The rounds stop before training in round 1: its samples make 0 pairs" in printed
    )
    assert "all scores equal" in printed and "No round is better than the first policy" in printed
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_dry_run_forecasts_each_stage_and_leaves_nothing(home, tmp_path):
    printed = rounds(home, new(home, tmp_path / "out", "dry_run=true", "n_eval_examples=4"))
    assert printed.startswith("0\n"), printed
    for part in ("36 samples", "up to 36 calls of the scorer", "training on up to 12 pairs", "3 held-out samples"):
        assert part in printed, printed
    assert "2 rounds:" in printed and "Time to the end" in printed
    assert not (tmp_path / "out").exists()
