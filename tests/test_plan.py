"""The arithmetic of a run."""

from collections import namedtuple
from types import SimpleNamespace

import pytest

from conftest import config_for, trained
from training import plan as plans
from training.io import UserError
from training.plan import Plan, log_averaging_time, word_marks


def test_a_run_needs_room_for_its_checkpoints(tmp_path, monkeypatch):
    plan, usage = Plan(10, 1, 1, 1, 1, {}, 0), namedtuple("usage", "free")
    for parameters, enough in ((10_000, 400_000), (100_000_000, 4_000_000_000)):
        monkeypatch.setattr(plans.shutil, "disk_usage", lambda _, n=enough: usage(n))
        plans.check_disk(plan, tmp_path, parameters)
        monkeypatch.setattr(plans.shutil, "disk_usage", lambda _, n=enough: usage(n - 1))
        with pytest.raises(UserError, match="bytes needed"):
            plans.check_disk(plan, tmp_path, parameters)


def test_babylm_marks_are_those_of_the_rules():
    """Every 1M words to 10M, every 10M to 100M, every 100M to 1B: 19 for Strict-Small, 28 for Strict."""
    million = 1_000_000
    rules = [*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100)]
    expected = {f"chck_{m}M.pt": m * million for m in rules}
    assert word_marks(["babylm"], 1000 * million) == expected and len(expected) == 28
    assert list(word_marks(["babylm"], 100 * million).values()) == [m * million for m in rules[:19]]
    # Ten epochs of a little less than ten million words end with the mark that the pipeline asks for.
    assert word_marks(["babylm"], 99_999_990)["chck_100M.pt"] == 99_999_990
    assert word_marks(["babylm"], 9_300_000)["chck_10M.pt"] == 9_300_000
    assert "chck_100M.pt" not in word_marks(["babylm"], 90 * million)
    assert list(word_marks(["babylm"], 0)) == ["chck_1M.pt"]  # which the plan calls out of reach
    assert list(word_marks(["babylm"], 43 * million)) == [f"chck_{m}M.pt" for m in rules[:13]]


def test_the_averaging_time_is_told_and_a_short_one_warned_of(capsys):
    plan = Plan(100, 4, 32, num_chunks=400, words=1000, marks={}, eval_every=0)
    config = SimpleNamespace(learning_rate=1e-3, weight_decay=10.0)  # 100 steps an epoch
    assert plan.averaging_time(config) == pytest.approx(1.0)
    log_averaging_time(plan, config)
    assert "over 1 epochs" in capsys.readouterr().out
    config.weight_decay = 40.0
    log_averaging_time(plan, config)
    assert "--weight-decay 40 is strong: weights forget within 0.25 epochs" in capsys.readouterr().err
    config.weight_decay = 0.0
    assert plan.averaging_time(config) is None


def test_word_marks_are_numbers_with_a_unit_or_without():
    assert word_marks(["babylm", "1500k", "700"], 2_000_000) == {
        "chck_700.pt": 700,
        "chck_1M.pt": 1_000_000,
        "chck_1500k.pt": 1_500_000,
        "chck_2M.pt": 2_000_000,
    }
    for wrong in ("all", "", "0", "-1M", "1G", "M", "²", "9" * 5000):
        with pytest.raises(UserError, match="--save-at-words"):
            word_marks([wrong], 10)


def test_a_mark_that_training_has_passed_is_named(data_folder, tmp_path, capsys):
    out = tmp_path / "run"
    trained(config_for(data_folder, out, stop_after=0))
    trained(config_for(data_folder, out, save_at_words=["20", "200"]))
    assert "training is past chck_20.pt" in capsys.readouterr().err
    assert (out / "chck_200.pt").exists() and not (out / "chck_20.pt").exists()
    trained(config_for(data_folder, tmp_path / "other", save_at_words=["20", "3M"]))
    assert "chck_3M.pt: the run sees only" in capsys.readouterr().err


def test_a_run_that_is_too_short_for_a_trace_says_so(data_folder, tmp_path, capsys):
    trained(config_for(data_folder, tmp_path / "short", steps=10, profile=2))
    assert "--profile: no trace was written" in capsys.readouterr().err
    trained(config_for(data_folder, tmp_path / "long", steps=11, profile=2))
    assert not capsys.readouterr().err and (tmp_path / "long" / "trace.json").exists()
