"""Errors of files name the file."""

import pytest

from dpo.system.files import naming_file


def test_a_write_that_torch_reports_names_its_file_and_the_free_space(tmp_path):
    with (
        pytest.raises(OSError, match=r"unexpected pos 64 vs 0; [\d.]+ GB free.*policy\.pt"),
        naming_file(tmp_path / "policy.pt"),
    ):
        raise RuntimeError("unexpected pos 64 vs 0")
