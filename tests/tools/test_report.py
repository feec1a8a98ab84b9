"""The command line of tools.report; what it writes is tested with dpo/reporting/page.py."""

import json

import pytest

from dpo.system.errors import UserError
from tools import report


def write_run(folder, pairs=()):
    """Write a run with one update, and pairs.jsonl with the margins of one evaluation."""
    folder.mkdir()
    (folder / "config.yaml").write_text("exp_name: first\n")
    (folder / "metrics.jsonl").write_text('{"examples": 8, "updates": 1, "loss/train": 0.5}\n')
    lengths = {"lengths/chosen": 9, "lengths/rejected": 7}
    rows = [{"examples": 8, "source": "mine", "row": i, "rewards/margins": margin} for i, margin in enumerate(pairs)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row | lengths) + "\n" for row in rows))


def test_suspects_are_printed_as_lines(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", [0.5, -0.2, -0.9])
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "run"), "--suspects"])
    report.main()
    assert capsys.readouterr().out == "mine\t2\t-0.9\nmine\t1\t-0.2\n"
    write_run(tmp_path / "sft")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "sft"), "--suspects"])
    with pytest.raises(UserError, match="holds no pairs.jsonl with evaluated pairs"):
        report.main()


def test_a_report_of_one_run_lies_in_its_folder_and_one_of_several_here(tmp_path, monkeypatch):
    for name in ("one", "other"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for names, path in ((["one"], "one/report.html"), (["one", "other"], "report.html")):
        monkeypatch.setattr("sys.argv", ["report", *names])
        report.main()
        assert (tmp_path / path).exists()


def test_the_exported_model_of_a_run_stands_for_the_run_and_any_other_model_is_sent_to_diagnose(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_run(run)
    (run / "step-8" / "hf").mkdir(parents=True)
    (run / "step-8" / "hf" / "config.json").write_text("{}")
    (run / "LATEST").symlink_to("step-8")
    for path in ("LATEST/hf", "step-8/hf", "step-8"):
        monkeypatch.setattr("sys.argv", ["report", str(run / path)])
        report.main()
        (run / "report.html").unlink()
    monkeypatch.chdir(run / "LATEST" / "hf")
    monkeypatch.setattr("sys.argv", ["report", "."])
    report.main()
    assert (run / "report.html").exists()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "hf")])
    with pytest.raises(UserError, match=r"hf: is a model's folder, .*python -m tools.diagnose policy=.*hf reference="):
        report.main()


def test_an_error_names_the_argument(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "no")])
    with pytest.raises(UserError, match=f"^{tmp_path / 'no'}: not a run directory: its config.yaml cannot be read"):
        report.main()
