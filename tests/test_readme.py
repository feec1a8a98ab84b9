"""The README's commands, paths and promises, and the commands that the original's users type."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, compose

import demo
import preference_datasets
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted(set(re.findall(r"^(?: {4})?python train\.py (.+)$|`python train\.py ([^`]+)`", README, re.MULTILINE)))
ORIGINAL = [
    "model=pythia69 datasets=[hh] loss=sft exp_name=NAME gradient_accumulation_steps=2 batch_size=64 "
    "eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false",
    "model=blank_model model.name_or_path=PATH model.block_name=LlamaDecoderLayer datasets=[hh,shp] loss=sft "
    "exp_name=NAME gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer "
    "sample_during_eval=false",
    "model=pythia69 datasets=[hh] loss=dpo loss.beta=0.1 model.archive=RUN/step-XXXX/policy.pt exp_name=NAME "
    "gradient_accumulation_steps=2 batch_size=32 eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false",
    "model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 model.fsdp_policy_mp=bfloat16 trainer=FSDPTrainer "
    "model.archive=RUN/LATEST/policy.pt sample_during_eval=false",
    "model=gpt2 loss=dpo loss.label_smoothing=0.1",
    "model=gpt2 loss=ipo loss.beta=0.1",
    "model=gpt2 loss=dpo loss.reference_free=true",
    "model=gpt2 loss=dpo activation_checkpointing=true",
]


def problems_of(command: str) -> list[str]:
    """Compose a command line and return what its settings are refused for, but for files that only its reader has."""
    settings = train.flat_settings(compose(*shlex.split(command)))
    told = train.setting_problems(settings) + train.combination_problems(settings)
    return [line for line in told if "no such file" not in line]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8 and len(BLOCKS) >= 4


@pytest.mark.parametrize("command", [a or b for a, b in COMMANDS if "resume=" not in a + b])  # see test_resume.py
def test_every_command_of_the_readme_composes_and_validates(command):
    assert problems_of(command) == []


@pytest.mark.parametrize("command", ORIGINAL)
def test_every_command_of_the_original_composes_and_validates(command):
    assert [line for line in problems_of(command) if "trainer=FSDPTrainer: is not built yet" not in line] == []


def test_the_worked_example_runs_as_it_stands(tmp_path):
    (example,) = (block for block in BLOCKS if "my_pairs/train.jsonl" in block)
    for path in [*ROOT.glob("*.py"), ROOT / "config"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-e", "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "generated_text" in done.stdout
    assert (tmp_path / "runs" / "dpo" / "LATEST" / "hf" / "model.safetensors").exists()


def test_every_path_in_the_readme_exists():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    for name in re.findall(r"^(\S+)", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    listed = set(re.findall(r"^(\w+\.py)", tree, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob("*.py")}


def test_the_data_set_of_the_readme_can_be_added(monkeypatch):
    source = re.search(r"```python\n(def get_mine.*?)```", README, re.DOTALL)[1]
    rows = [{"question": "\n\nHuman: Hi.\n\nAssistant:", "better": " Hello.", "worse": " Go."}]
    monkeypatch.setattr(preference_datasets, "load_hub_split", lambda path, split, cache_dir: rows)
    exec(source, vars(preference_datasets))
    try:
        data = preference_datasets.get_mine("train")
    finally:
        del preference_datasets.get_mine
    entry = {"responses": [" Hello.", " Go."], "pairs": [(0, 1)], "sft_target": " Hello."}
    assert data == {"\n\nHuman: Hi.\n\nAssistant:": entry}


# The demo


def test_the_demo_data_set_is_what_the_readme_says():
    train_rows, test_rows = demo.make_rows("train"), demo.make_rows("test")
    assert (len(train_rows), len(test_rows)) == (2000, 200)
    prompts = [row["prompt"] for row in train_rows + test_rows]
    assert len(set(prompts)) == 2200
    assert sum(row["sft_target"] == row["chosen"] for row in train_rows) == 1000
    assert demo.make_rows("train") == train_rows


def test_the_judge_knows_every_review_of_the_demo_and_no_other_text():
    for row in demo.make_rows("test"):
        assert (demo.judge(row["chosen"]), demo.judge(row["rejected"])) == ("warm", "cold")
        chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
        assert demo.judge(chosen[:-1]) == "neither"  # the last sentence is not whole
        assert demo.judge(re.split(r"(?<=[.!]) ", chosen)[0]) == "neither"  # a verdict alone
        assert demo.judge(f"{chosen} {rejected}") == "neither"  # both verdicts
    for text in ("", "I like it.", "a a a a", "The the film is fine. It is good."):
        assert demo.judge(text) == "neither"


def test_the_demo_ends_with_a_plain_summary(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"rewards_eval/accuracies": 0.995, "rewards_eval/margins": 2.1}\n')
    warm, cold = (demo.make_rows("test")[0][side] for side in ("chosen", "rejected"))
    rows = [("policy", "p", "old"), ("policy", "p", warm), ("reference", "p", cold), ("reference", "q", "neither")]
    lines = [{"model": m, "prompt": p, "sample": s} for m, p, s in rows]
    (tmp_path / "samples.jsonl").write_text("".join(demo.json.dumps(line) + "\n" for line in lines))
    told = demo.summary(tmp_path)
    (command,) = re.findall(r"python train\.py (.*)", told)
    assert problems_of(command) == []
    assert "Held-out reward accuracy 0.995" in told and "Reward margin 2.10" in told
    assert "SFT model   0.00 of the judged samples are warm (2 samples: 0 warm, 1 cold, 1 neither)" in told
    assert "DPO policy  1.00 of the judged samples are warm (1 samples: 1 warm, 0 cold, 0 neither)" in told
