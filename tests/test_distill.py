"""Distillation is training with another objective: what learns, what is refused."""

from pathlib import Path

import pytest
import torch

import distill
import model as models
from conftest import OPTIONS, run, save_model, step_of, weights, write_split, write_text
from data import BatchStream
from distill import DistillConfig, FusedDistillationObjective
from loss import Coefficients, plain_distillation_loss
from training.checkpoint import content_digest
from training.device import autocast_for, compile_blocks


def config(**changes):
    return DistillConfig(**{"teachers": ["a", "b"], "model": "llama-tiny"} | changes)


def ensemble():
    torch.manual_seed(1)
    return [models.build_model(name, 300) for name in ("gpt2-tiny", "llama-tiny")]


def test_the_objective_is_the_formula_of_the_paper(train_shard):
    torch.manual_seed(0)
    student, teachers = models.build_model("llama-tiny", 300), ensemble()
    batch = BatchStream(train_shard, 4, 32, seed=0)(0)
    for reduction, denominator in (("sequence", 4), ("token", 4 * 32)):
        options = config(alpha=0.4, temperature=1.5, kl_reduction=reduction, teacher_weights=[2, 1])
        objective = FusedDistillationObjective(student, teachers, options).train()
        result = objective(objective.prepare(batch))
        expected = plain_distillation_loss(
            student(batch.tokens),
            [t.eval()(batch.tokens) for t in teachers],
            [2, 1],
            batch.targets,
            Coefficients(alpha=0.4, tau=1.5, num_targets=128, kl_denominator=denominator),
        )
        for key in expected:
            torch.testing.assert_close(result[key], expected[key], rtol=1e-5, atol=1e-6)
        ours = torch.autograd.grad(result["loss"], list(student.parameters()))
        theirs = torch.autograd.grad(expected["loss"], list(student.parameters()))
        for a, b in zip(ours, theirs):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_only_the_student_learns_and_only_it_is_in_training_mode(train_shard):
    student, teachers = models.build_model("llama-tiny", 300), ensemble()
    objective = FusedDistillationObjective(student, teachers, config()).train()
    assert student.training and not any(t.training for t in teachers)
    before = [p.clone() for p in objective.parameters()]
    step = step_of(objective, weight_decay=0.1)
    step(BatchStream(train_shard, 4, 32, seed=0)(0), 1e-3)
    changed = [not torch.equal(a, b) for a, b in zip(before, objective.parameters())]
    num_student = len(list(student.parameters()))
    assert all(changed[:num_student]) and not any(changed[num_student:])
    assert all(p.grad is None for t in teachers for p in t.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(train_shard):
    teacher = models.build_model("llama-tiny", 300)
    objective = FusedDistillationObjective(teacher, [teacher], config(alpha=0.0))
    terms = objective(objective.prepare(BatchStream(train_shard, 4, 32, seed=0)(0)))
    assert terms["kl"] < 1e-5


def gradients(objective, batch, device):
    torch.manual_seed(1)  # for dropout
    objective.model.zero_grad()
    with autocast_for(torch.device(device), "bf16"):
        loss = objective(objective.prepare(batch))["loss"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in objective.model.parameters()])


@pytest.mark.parametrize(
    "device, student",
    [
        # A compiler runs for half a minute.
        pytest.param("cpu", "llama-tiny", marks=pytest.mark.faults),
        pytest.param("cpu", "gpt2-tiny", marks=pytest.mark.faults),
        pytest.param("cuda", "llama-tiny", marks=pytest.mark.gpu),
    ],
)
def test_compiled_gradients_are_the_eager_ones(train_shard, device, student):
    """Dropout's masks too."""
    torch.manual_seed(0)
    student = models.build_model(student, 300)
    objective = FusedDistillationObjective(student, ensemble(), config()).to(device).train()
    batch = BatchStream(train_shard, 4, 32, seed=0)(0).to(torch.device(device))
    eager = gradients(objective, batch, device)
    compile_blocks(objective)
    compiled = gradients(objective, batch, device)
    assert abs(compiled[0] - eager[0]) < 1e-3 * eager[0]
    assert (compiled[1] - eager[1]).norm() < 0.02 * eager[1].norm()


# ---- the program


def test_a_student_is_distilled_from_both(teachers, data_folder, tmp_path, capsys, refused):
    out = tmp_path / "s"
    arguments = ["--model", "llama-tiny", "--data", data_folder, "--out", out, *OPTIONS, "--teachers"]
    assert run(distill, *arguments, *teachers) == 0
    printed = capsys.readouterr().out
    assert "0.5 as given, 0.0303 per token (sequence)" in printed  # 0.5 / (0.5 + 0.5 · 32)
    assert '"kl"' in (out / "log.jsonl").read_text()
    _, checkpoint = models.load_checkpoint(out / "best.pt")
    assert [t["name"] for t in checkpoint["teachers"]] == ["gpt2-tiny", "llama-tiny"]
    for path, teacher in zip(teachers, checkpoint["teachers"]):
        assert teacher["digest"] == content_digest(weights(path))
    assert not any("teachers" in key for key in checkpoint["weights"])
    # Finished: the same command has nothing left to do. Other teachers: another run.
    assert run(distill, *arguments, *teachers) == 0
    swapped = refused(distill, *arguments, *reversed(teachers))
    assert "teacher_digests.0 changed" in swapped
    assert "teacher_digests" in refused(distill, *arguments, teachers[0])


@pytest.fixture
def refused_at_once(refused, tmp_path):
    """`refused` for a distillation, before anything is written."""

    def end_of(*arguments):
        error = refused(distill, *arguments, "--out", tmp_path / "s", *OPTIONS)
        assert not (tmp_path / "s").exists()
        return error

    return end_of


def test_a_teacher_with_another_tokenizer_of_the_same_size_is_refused(
    teachers, other_tokenizer, tmp_path, refused_at_once
):
    (tmp_path / "tokenizer.model").write_bytes(other_tokenizer.model_bytes)
    for split in ("train", "dev"):
        write_split(tmp_path, split, other_tokenizer, {"text": write_text(2000, seed=9)})
    error = refused_at_once("--teachers", *teachers, "--data", tmp_path)
    assert "another tokenizer" in error and "gpt2-tiny" in error


SHAPES = [(300, 16, "--sequence-length"), (299, 64, "299 logits"), (320, 64, "320 logits")]


@pytest.mark.parametrize("size, positions, message", SHAPES)
def test_a_teacher_of_another_shape_is_refused(
    data_folder, tokenizer, tmp_path, refused_at_once, size, positions, message
):
    teacher = models.build_model("gpt2-tiny", size, max_position_embeddings=positions)
    save_model(tmp_path / "t.pt", teacher, tokenizer, "gpt2-tiny")
    assert message in refused_at_once("--teachers", tmp_path / "t.pt", "--data", data_folder)


@pytest.mark.parametrize("given", ["1", "-1 2", "nan 2"])
def test_impossible_teacher_weights_are_refused(teachers, data_folder, refused_at_once, given):
    arguments = ["--teachers", *teachers, "--data", data_folder, "--teacher-weights", *given.split()]
    assert "--teacher-weights" in refused_at_once(*arguments)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "--teachers a.pt --alpha 1.5",
        "--teachers a.pt --temperature 0",
        "--teachers a.pt --random-offset --cache-teachers auto",  # chunks that move cannot be kept
    ],
)
def test_wrong_usage_exits_with_2(given):
    with pytest.raises(SystemExit) as stop:
        distill.main(given.split())
    assert stop.value.code == 2


def test_what_is_no_teacher_is_named_with_the_way_in(data_folder, tmp_path, refused_at_once):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    paths = {data_folder / "train.bin": "no checkpoint", tmp_path / "hf": "export_hf.py --import"}
    for path, message in (paths | {tmp_path / "none.pt": "does not exist"}).items():
        error = refused_at_once("--teachers", path, "--data", data_folder)
        assert str(path) in error and message in error


def test_a_checkpoint_is_no_teacher_cache(teachers, data_folder, refused_at_once):
    """It must not be called a damaged cache: the remedy for that is to delete it."""
    before = Path(teachers[0]).read_bytes()
    given = ("--teachers", *teachers, "--data", data_folder, "--cache-teachers", teachers[0])
    error = refused_at_once(*given)
    assert "is no teacher cache" in error and "delete" not in error
    assert Path(teachers[0]).read_bytes() == before
