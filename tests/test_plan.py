"""The arithmetic of a run."""

from collections import namedtuple

import pytest

from training import plan as plans
from training.io import UserError
from training.plan import Plan, word_marks


def test_a_small_run_needs_little_room(tmp_path, monkeypatch):
    """What is kept free besides the states is no more than they are, and at most 64 MiB."""
    plan, usage = Plan(10, 1, 1, 1, 1, {}, 0), namedtuple("usage", "free")
    for parameters, enough in ((10_000, 800_000), (100_000_000, 4_000_000_000 + (64 << 20))):
        monkeypatch.setattr(plans.shutil, "disk_usage", lambda _, n=enough: usage(n))
        plans.check_disk(plan, tmp_path, parameters)
        monkeypatch.setattr(plans.shutil, "disk_usage", lambda _, n=enough: usage(n - 1))
        with pytest.raises(UserError, match="bytes needed"):
            plans.check_disk(plan, tmp_path, parameters)


def test_the_marks_of_the_2025_rules():
    marks = word_marks(["babylm"], 43_000_000)
    million = 1_000_000
    expected = [*range(1, 11), 20, 30, 40]
    assert marks == {f"chck_{m}M.pt": m * million for m in expected}
    assert word_marks(["babylm", "1500k", "700"], 2_000_000) == {
        "chck_700.pt": 700,
        "chck_1M.pt": million,
        "chck_1500k.pt": 1_500_000,
        "chck_2M.pt": 2 * million,
    }
    for wrong in ("all", "", "0", "-1M", "1G", "M", "²", "9" * 5000):
        with pytest.raises(UserError, match="--save-at-words"):
            word_marks([wrong], 10)
