"""Broken data, mistyped command lines and forged files: each is refused in one line, and none runs anything."""

import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from conftest import GOLDENS, TINY, read_data, validated
from faults import BUSY, again, command_line, fresh, rng
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.examples import Tokenization
from dpo.runs import checkpoints
from dpo.settings.schema import Settings, known_keys
from dpo.system import files
from dpo.system.errors import UserError
from losses import LOSSES

# Fuzzed data files


def good_row(i: int) -> dict[str, str]:
    return {"prompt": f"\n\nHuman: Say {i}.\n\nAssistant:", "chosen": f" {i}.", "rejected": f" not {i}."}


def spoil_value(row, draw):
    field = ("prompt", "chosen", "rejected")[draw.randint(3)]
    values = (None, 3, -1.5, True, [], ["a"], {}, {"text": "a"}, "", "  \n")
    return json.dumps(row | {field: values[draw.randint(len(values))]}).encode()


def spoil_fields(row, draw):
    row = dict(row)
    del row[("prompt", "chosen", "rejected")[draw.randint(3)]]
    return json.dumps(row).encode()


def spoil_form(row, draw):
    return (b"[]", b"3", b'"text"', b"null", b"true", b"", b"   ", json.dumps([row]).encode())[draw.randint(8)]


def spoil_json(row, draw):
    line = json.dumps(row).encode()
    at = draw.randint(1, len(line))
    deep = b'{"chosen": ' + b"[" * 100_000
    return (line[:at], line.replace(b'"', b"'"), line + b",", deep, b'{"chosen": 1' + b"0" * 5000 + b"}")[
        draw.randint(5)
    ]


def spoil_bytes(row, draw):
    line = json.dumps(row).encode()
    at = draw.randint(12, len(line) - 3)
    return line[:at] + (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x00", b"\xe2\x82")[draw.randint(5)] + line[at:]


def spoil_text(row, draw):
    texts = ("\ud800", "a\udfffb", "x" * 3_000_000, "\x00" * 50, row["rejected"], "<|endoftext|>")
    return json.dumps(row | {"chosen": texts[draw.randint(len(texts))]}).encode()


SPOILERS = (spoil_value, spoil_fields, spoil_form, spoil_json, spoil_bytes, spoil_text)


def fuzzed_folder(folder: Path, i: int) -> tuple[Path, int]:
    """Write a folder of 6 rows, one of which is spoilt, or whose file as a whole is; return that row's number."""
    draw = rng(i)
    rows = [json.dumps(good_row(k)).encode() for k in range(6)]
    at = int(draw.randint(6))
    folder.mkdir()
    if i % 8 < len(SPOILERS):
        rows[at] = SPOILERS[i % 8](good_row(at), draw)
        (folder / "train.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    elif i % 8 == 6:
        packed = gzip.compress(b"\n".join(rows) + b"\n")
        broken = bytearray(packed)
        broken[draw.randint(12, len(packed))] ^= 1 << draw.randint(8)
        content = (packed[: draw.randint(len(packed))], bytes(broken), b"\x1f\x8b", b"plain text")[draw.randint(4)]
        (folder / "train.jsonl.gz").write_bytes(content)
    else:
        (folder / "train.jsonl").write_bytes(
            (b"", b"\n\n\n", b"\xef\xbb\xbf" + rows[0], b"\x80" * 100)[draw.randint(4)]
        )
    shutil.copy(GOLDENS / "data" / "test.jsonl", folder / "test.jsonl")
    return folder, at + 1


def test_no_fuzzed_data_file_gives_a_traceback_or_is_accepted_in_silence(tmp_path, report):
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    outcomes = {"refused": 0, "counted": 0, "usable": 0}
    for i in range(200):
        folder, row = fuzzed_folder(tmp_path / f"data{i}", i)
        try:
            data = read_data(folder, tokenizer=tokenizer)["train"]
            items = [item for group in data for item in group]
            if items:
                assert len(Tokenization(tokenizer, 160, 96)(items)) == len(items)
        except UserError as error:
            outcomes["refused"] += 1
            assert "train.jsonl" in str(error) and len(str(error).splitlines()) == 1, error
            assert re.search(r"row \d+", str(error)), error
            if i % 8 < len(SPOILERS):
                assert f"row {row}" in str(error), (i, str(error))
            continue
        remarks = sum(n for what, n in data.counts.items() if what not in ("read", "kept"))
        dropped = sum(n for what, n in data.counts.items() if what.startswith("dropped"))
        assert data.counts.read == data.counts["kept"] + dropped
        assert len(items) == data.counts["kept"]
        outcomes["counted" if remarks or not items else "usable"] += 1
        if not remarks and items:  # an unusual text, such as a very long one, is a text; a BOM or a blank line is none
            assert (i % 8, len(items)) in ((2, 5), (5, 6), (6, 6), (7, 1)), i
    report(f"200 fuzzed data files: {outcomes}; no traceback")


# Mutated command lines

OWN_WAYS = ("resume", "local_run_dir", "datasets", "local_dirs", "lr")  # which take lists, or are too short for a typo
KEYS = [
    key for key in Settings.model_fields if key not in ("wandb", "model", "loss", "columns") and key not in OWN_WAYS
]


def mutated(i: int) -> tuple[str, str]:
    """Return a wrong argument, and what its refusal must begin with or name."""
    draw = rng(1000 + i)
    key = KEYS[draw.randint(len(KEYS))]
    kind = i % 5
    if kind == 0:  # a typo: a letter is dropped, doubled or swapped
        at = int(draw.randint(1, len(key) - 1))
        typo = (
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key[:at] + key[at + 1] + key[at] + key[at + 2 :],
        )
        wrong = typo[draw.randint(3)]
        if wrong in known_keys(LOSSES):
            return f"{wrong}x=1", f"{wrong}x"
        return f"{wrong}=1", f"{wrong}: there is no such setting; did you mean {key}?"
    if kind == 1:  # a wrong type
        return f"{key}=[1,2]", f"{key}="
    if kind == 2:  # out of range
        return OUT_OF_RANGE[draw.randint(len(OUT_OF_RANGE))]
    if kind == 3:  # values that do not go together
        return TOGETHER[draw.randint(len(TOGETHER))]
    return UNREADABLE[draw.randint(len(UNREADABLE))]


OUT_OF_RANGE = [
    ("lr=-1", "lr=-1"),
    ("batch_size=0", "batch_size=0"),
    ("max_length=1", "max_length=1"),
    ("sample_top_p=1.5", "sample_top_p=1.5"),
    ("loss.label_smoothing=0.7", "loss.label_smoothing=0.7"),
    ("seed=99999999999", "seed=99999999999"),
    ("keep_checkpoints=0", "keep_checkpoints=0"),
    ("max_tokens_per_pass=0", "max_tokens_per_pass=0"),
    ("max_length=100000", "max_length=100000"),
    ("lr=.inf", "lr=.inf"),
    ("optimizer=Adm", "optimizer=Adm"),
    ("exp_name=../x", "exp_name=../x"),
]
TOGETHER = [
    ("gradient_accumulation_steps=3", "batch_size=8 gradient_accumulation_steps=3"),
    ("max_prompt_length=200", "max_prompt_length=200 max_length=160"),
    ("n_epochs=null", "n_epochs=null n_examples=null"),
    ("keep_policies=true", "keep_policies=true keep_checkpoints=null"),
    ("model.policy_dtype=bfloat16", "precision=float32 model.policy_dtype=bfloat16"),
    ("model.archive=nowhere.pt", "model.archive=nowhere.pt"),
    ("resume=nowhere", "resume=nowhere"),
]
UNREADABLE = [
    ("loss=dpp", "loss=dpp: there is no such file"),
    ("model=gtp2", "model=gtp2: there is no such file"),
    ("batch_size", "batch_size"),
    ("=3", ""),
    ("lr=[1", ""),
    ("+loss.gamna=3", "loss.gamna: there is no such setting"),
    ("~lr", "lr: is missing"),
    ("lr={a:1}", "lr"),
    ("datasets=[nowhere]", "datasets=[nowhere]"),
    ("model.name_or_path=/nowhere", "model.name_or_path=/nowhere"),
    ("lr=${nowhere}", "lr"),
]


def test_a_mutated_command_line_is_refused_in_one_line_before_weights_load(tmp_path, counts, report):
    def loading_ends_the_test() -> None:
        AutoModelForCausalLM.from_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(SystemExit(99))

    slowest = 0.0
    for i in range(counts(small=25, full=100)):
        argument, told = mutated(i)
        folder = tmp_path / f"run{i}"
        start = time.monotonic()
        result = command_line(folder, fresh(folder, *TINY, "loss=dpo", argument), loading_ends_the_test)
        slowest = max(slowest, time.monotonic() - start)
        lines = result.stderr.splitlines()
        assert result.returncode == 2, (argument, result)
        assert len(lines) == 1 and lines[0].startswith("error: "), (argument, lines)
        assert told in lines[0] if i % 5 == 4 else lines[0].startswith(f"error: {told}"), (argument, lines)
        assert not folder.exists(), argument
    report(f"mutated command lines: {counts(25, 100)}, each one line and exit code 2, slowest {slowest:.1f} s")


# Forged files


class Bomb:
    """Its unpickling would create a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def forged(folder: Path, canary: Path, name: str, how: str) -> None:
    """Put a payload into one file of a checkpoint, whose manifest is made to agree."""
    path = folder / f"{name}.pt"
    value = {"step_idx": 8, "state": Bomb(canary), "metrics": {}}
    if how == "pickle":
        path.write_bytes(pickle.dumps(value))
    elif how == "zip":
        torch.save(value, path)
    else:
        part = torch.load(path, weights_only=True)
        part["state"] = part["state"] | {"x": Bomb(canary)}
        torch.save(part, path)
    (folder / "MANIFEST").unlink()
    files.write_manifest(folder, {})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with one checkpoint, to be resumed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    result = command_line(folder, fresh(folder, *BUSY, "loss=sft", "n_examples=8"))
    assert result.returncode == 0, result.stderr
    shutil.rmtree(folder / "step-8" / "hf")
    return folder


@pytest.mark.parametrize("how", ["pickle", "zip", "among weights"])
@pytest.mark.parametrize("name", checkpoints.PARTS)
def test_a_payload_in_a_checkpoint_is_not_executed(name, how, stopped, tmp_path):
    folder, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(stopped, folder, symlinks=True)
    forged(folder / "step-8", canary, name, how)
    result = command_line(folder, again(folder))
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    assert not canary.exists()


@pytest.mark.parametrize("how", ["pickle", "zip", "among weights"])
def test_a_payload_in_an_archive_is_not_executed(how, stopped, tmp_path):
    folder, canary = tmp_path / "copy", tmp_path / "canary"
    shutil.copytree(stopped / "step-8", folder)
    forged(folder, canary, "policy", how)
    result = command_line(tmp_path, fresh(tmp_path / "run", *BUSY, "loss=sft", f"model.archive='{folder}/policy.pt'"))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and not canary.exists()


@pytest.mark.parametrize("how", ["pickle", "zip"])
def test_a_payload_in_the_weights_of_a_model_is_not_executed(how, tmp_path):
    model, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(GOLDENS / "tiny-gpt2", model)
    (model / "model.safetensors").unlink()
    value = {"transformer.wte.weight": Bomb(canary)}
    path = model / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(value)) if how == "pickle" else torch.save(value, path)
    arguments = fresh(tmp_path / "run", *BUSY, "loss=sft", f"model.name_or_path='{model}'")
    result = command_line(tmp_path / "run", arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and not canary.exists(), result.stderr


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["known model", "unknown model"])
def test_code_that_comes_with_a_model_is_not_executed(file, kind, tmp_path):
    model, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(GOLDENS / "tiny-gpt2", model)
    settings = json.loads((model / file).read_text()) if (model / file).exists() else {}
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    settings["auto_map"] = {name: ["evil.Evil", "evil.Evil"] if "Tok" in name else "evil.Evil" for name in names}
    if kind == "unknown model":
        settings |= {"model_type": "evil", "tokenizer_class": "Evil"}
    (model / file).write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    arguments = fresh(tmp_path / "run", *BUSY, "loss=sft", "n_examples=8", f"model.name_or_path='{model}'")
    result = command_line(tmp_path / "run", arguments)
    assert not canary.exists() and result.returncode in (0, 2) and "Traceback" not in result.stderr, result.stderr


HOSTILE_SETTINGS = [
    ("seed: 0", "seed: 0\n_target_: os.system\ncommand: touch {canary}"),
    ("  archive: null", "  archive: null\n  _target_: pathlib.Path.touch\n  self: {canary}"),
    ("seed: 0", "seed: !!python/object/apply:os.system ['touch {canary}']"),
    ("seed: 0", "seed: !!python/object/apply:builtins.open ['{canary}', 'w']"),
    ("seed: 0", "seed: ${{oc.create:{canary}}}"),
    ("seed: 0", "seed: 0b_"),
    ("seed: 0", "seed: " + "[" * 2000),
    ("  name: sft", "  nome: sft"),
    ("seed: 0", "seed: ${{eval:open('{canary}','w')}}"),
]


@pytest.mark.parametrize("old, new", HOSTILE_SETTINGS)
def test_settings_of_a_run_directory_execute_nothing(old, new, stopped, tmp_path):
    folder, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(stopped, folder, symlinks=True)
    settings = (folder / "config.yaml").read_text()
    assert old in settings
    (folder / "config.yaml").write_text(settings.replace(old, new.format(canary=canary)))
    result = command_line(folder, again(folder))
    assert not canary.exists() and result.returncode == 2 and "Traceback" not in result.stderr, result


@pytest.mark.parametrize("path", ["../outside", "/tmp/outside", "a/../../outside", "a/b", "..", "", "\x00"])
def test_a_name_cannot_leave_its_directory(path):
    with pytest.raises(UserError, match="exp_name="):
        validated("loss=sft", *TINY, f"exp_name='{path}'" if path != "\x00" else 'exp_name="\x00"')


@pytest.mark.parametrize(
    "what", ["step", "file", "LATEST", "manifest", ".lock", "metrics.jsonl", "policies", "metrics.json"]
)
def test_links_and_paths_of_a_run_directory_lead_nowhere_else(what, stopped, tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(stopped, folder, symlinks=True)
    shutil.copytree(folder / "step-8", outside)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in outside.iterdir())
    if what == "step":
        shutil.rmtree(folder / "step-8")
        (folder / "step-8").symlink_to(outside)
    elif what == "file":
        (folder / "step-8" / "run.pt").unlink()
        (folder / "step-8" / "run.pt").symlink_to(outside / "run.pt")
    elif what == "LATEST":
        shutil.rmtree(folder / "step-8")
        (folder / "LATEST").unlink()
        (folder / "LATEST").symlink_to(outside)
    elif what == ".lock" or what == "metrics.jsonl":
        (folder / what).unlink()
        (folder / what).symlink_to(outside / "policy.pt")
    elif what == "metrics.json":  # of a checkpoint that a signal wrote before the evaluation
        (folder / "step-8" / what).unlink()
        part = (folder / "step-8" / "MANIFEST").read_text().partition("# ")[0]
        lines = "".join(line for line in part.splitlines(keepends=True) if what not in line)
        own = hashlib.sha256(lines.encode()).hexdigest()
        (folder / "step-8" / "MANIFEST").write_text(f"{lines}# {own}\n")
        (folder / "step-8" / what).symlink_to(outside / "policy.pt")
    elif what == "policies":
        (folder / what).symlink_to(outside)
        (outside / ".staging-x").write_text("of another run")
        before = sorted((path.name, path.stat().st_mtime_ns) for path in outside.iterdir())
    else:
        manifest = (folder / "step-8" / "MANIFEST").read_text().partition("# ")[0]
        lines = manifest.replace("  run.pt", "  ../../outside/run.pt")
        own = hashlib.sha256(lines.encode()).hexdigest()
        (folder / "step-8" / "MANIFEST").write_text(f"{lines}# {own}\n")
    result = command_line(folder, again(folder))
    assert result.returncode in (0 if what == "metrics.json" else 2, 3), result.stderr
    assert len(result.stderr.splitlines()) == (what != "metrics.json"), result.stderr
    assert sorted((path.name, path.stat().st_mtime_ns) for path in outside.iterdir()) == before


def test_the_settings_that_a_run_keeps_are_plain_yaml(stopped):
    assert yaml.safe_load((stopped / "config.yaml").read_text())["loss"]["name"] == "sft"


# Texts that would write to the terminal, and terminals that take no text


def forged_data(folder: Path) -> tuple[Path, str]:
    """Write a data set with one prompt, which clears the screen and forges an error, and return it and the prompt."""
    prompt = "\n\nHuman: caf\u00e9 \u2615 \x1b[2J\rerror: forged\nerror: again\n\nAssistant:"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"chosen": f"{prompt} yes {i}", "rejected": f"{prompt} no {i}"} for i in range(16)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder, prompt


def test_texts_cannot_write_to_the_terminal_and_no_encoding_stops_a_run(tmp_path):
    def ascii_alone() -> None:
        sys.stdout.reconfigure(encoding="ascii", errors="strict")

    data, prompt = forged_data(tmp_path / "data")
    settings = (*BUSY, "loss=dpo", "eval_every=8", "n_examples=8", f"datasets=['{data}']")
    result = command_line(tmp_path / "run", fresh(tmp_path / "run", *settings), ascii_alone)
    assert result.returncode == 0, result.stderr
    assert "error: forged" in result.stdout and "\\x1b[2J" in result.stdout and "\\u2615" in result.stdout
    assert not [line for line in result.stdout.splitlines() if line.startswith("error")]
    assert "\x1b" not in result.stdout and "\r" not in result.stdout
    samples = (result.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(samples[0])["prompt"] == prompt


def test_a_run_whose_streams_are_closed_goes_to_its_end(tmp_path):
    def closed() -> None:
        """Do what Python does where it starts without streams."""
        sys.stdin = sys.stdout = sys.stderr = None
        for descriptor in range(3):
            with suppress(OSError):  # the streams may have closed it
                os.close(descriptor)

    folder = tmp_path / "run"
    done = command_line(folder, fresh(folder, *BUSY, "loss=sft", "n_examples=16"), closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "LATEST" / "hf").is_dir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["examples"] == 16


def test_an_error_text_cannot_write_to_the_terminal(tmp_path):
    result = command_line(tmp_path, fresh(tmp_path / "run", *TINY, "loss=dpo", "model.archive='a\x1b[2J b'"))
    assert result.returncode == 2 and "model.archive=a\\x1b[2J b" in result.stderr and "\x1b" not in result.stderr
