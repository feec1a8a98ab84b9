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
