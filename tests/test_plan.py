"""The arithmetic of a run."""

import pytest

from harness.files import UserError
from harness.plan import word_marks


def test_the_marks_of_the_2025_rules():
    marks = word_marks(["babylm"], 43_000_000)
    million = 1_000_000
    expected = [*range(1, 11), 20, 30, 40]
    assert marks == {f"chck_{m}M.pt": m * million for m in expected}
    assert word_marks(["babylm", "1500k", "700"], 2_000_000) == {
        "chck_700.pt": 700, "chck_1M.pt": million, "chck_1500k.pt": 1_500_000,
        "chck_2M.pt": 2 * million,
    }  # fmt: skip
    for wrong in ("all", "", "0", "-1M", "1G", "M", "²", "9" * 5000):
        with pytest.raises(UserError, match="--save-at-words"):
            word_marks([wrong], 10)
