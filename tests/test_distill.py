"""Distillation is training with another objective: what learns, what is refused."""

from pathlib import Path

import pytest
import torch

import distill
import model as models
import train
from conftest import save_model, step_of, train_tokenizer, write_split, write_text
from data import BatchStream, open_corpus
from distill import DistillConfig, FusedDistillationObjective
from loss import Coefficients, plain_distillation_loss
from training.checkpoint import content_digest, read_checkpoint
from training.device import autocast_for, compile_blocks
from training.io import run_program


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


def test_only_the_student_learns(train_shard):
    student, teachers = models.build_model("llama-tiny", 300), ensemble()
    objective = FusedDistillationObjective(student, teachers, config()).train()
    before = [p.clone() for p in objective.parameters()]
    step = step_of(objective, weight_decay=0.1)
    step(BatchStream(train_shard, 4, 32, seed=0)(0), 1e-3)
    changed = [not torch.equal(a, b) for a, b in zip(before, objective.parameters())]
    num_student = len(list(student.parameters()))
    assert all(changed[:num_student]) and not any(changed[num_student:])
    assert all(p.grad is None for t in teachers for p in t.parameters())


def test_teachers_stay_in_eval_mode_while_the_student_trains():
    objective = FusedDistillationObjective(models.build_model("gpt2-tiny", 300), ensemble(), config())
    objective.train()
    assert objective.model.training and not any(t.training for t in objective.teachers)


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


def compiled_and_eager(train_shard, device, student):
    torch.manual_seed(0)
    student = models.build_model(student, 300)
    objective = FusedDistillationObjective(student, ensemble(), config()).to(device).train()
    batch = BatchStream(train_shard, 4, 32, seed=0)(0).to(torch.device(device))
    eager = gradients(objective, batch, device)
    compile_blocks(objective)
    compiled = gradients(objective, batch, device)
    assert abs(compiled[0] - eager[0]) < 1e-3 * eager[0]
    assert (compiled[1] - eager[1]).norm() < 0.02 * eager[1].norm()


@pytest.mark.faults
@pytest.mark.parametrize("student", ["llama-tiny", "gpt2-tiny"])
def test_compiled_gradients_are_the_eager_ones(train_shard, student):
    """Dropout's masks too. Among the long tests, because a compiler runs for half a minute."""
    compiled_and_eager(train_shard, "cpu", student)


@pytest.mark.gpu
def test_compiled_gradients_are_the_eager_ones_on_a_gpu(train_shard):
    compiled_and_eager(train_shard, "cuda", "llama-tiny")


# ---- the program


@pytest.fixture(scope="module")
def teachers(data_folder, tmp_path_factory):
    """Two trained teachers: paths of their checkpoints."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("gpt2-tiny", "llama-tiny"):
        train.main(["--model", name, "--data", str(data_folder), "--out", str(folder / name), *SHORT])
    return [str(folder / name / "best.pt") for name in ("gpt2-tiny", "llama-tiny")]


SHORT = ["--steps", "6", "--batch-size", "4", "--sequence-length", "32", "--device", "cpu"]
SHORT += ["--eval-sequences", "8", "--log-every", "2"]


def test_a_student_is_distilled_from_both(teachers, data_folder, tmp_path, capsys):
    out = tmp_path / "s"
    arguments = ["--teachers", *teachers, "--model", "llama-tiny", "--data", str(data_folder)]
    assert distill.main([*arguments, "--out", str(out), *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "0.5 as given, 0.0303 per token (sequence)" in printed  # 0.5 / (0.5 + 0.5 · 32)
    assert '"kl"' in (out / "log.jsonl").read_text()
    _, checkpoint = models.load_checkpoint(out / "best.pt")
    assert [t["name"] for t in checkpoint["teachers"]] == ["gpt2-tiny", "llama-tiny"]
    for path, teacher in zip(teachers, checkpoint["teachers"]):
        assert teacher["digest"] == content_digest(read_checkpoint(path)["weights"])
    assert not any("teachers" in key for key in checkpoint["weights"])
    # Finished: the same command has nothing left to do. Other teachers: another run.
    assert distill.main([*arguments, "--out", str(out), *SHORT]) == 0
    swapped = ["--teachers", *reversed(teachers), *arguments[3:], "--out", str(out), *SHORT]
    assert run_program(lambda: distill.main(swapped)) == 1
    assert "teacher_digests: the same in another order" in capsys.readouterr().err
    other = ["--teachers", teachers[0], *arguments[3:], "--out", str(out), *SHORT]
    assert run_program(lambda: distill.main(other)) == 1
    assert "teacher_digests" in capsys.readouterr().err


def refused(capsys, out, *arguments):
    """The one line with which a distillation is refused before anything is written."""
    assert run_program(lambda: distill.main([*map(str, arguments), "--out", str(out), *SHORT])) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not out.exists()
    return error


def test_a_teacher_with_another_tokenizer_of_the_same_size_is_refused(teachers, tmp_path, capsys):
    other = train_tokenizer(write_text(2000, seed=1).replace("dog", "fox"))
    (tmp_path / "tokenizer.model").write_bytes(other.model_bytes)
    for split in ("train", "dev"):
        write_split(tmp_path, split, other, {"text": write_text(2000, seed=9)})
    error = refused(capsys, tmp_path / "s", "--teachers", *teachers, "--data", tmp_path)
    assert "another tokenizer" in error and "gpt2-tiny" in error


@pytest.mark.parametrize(
    "vocabulary_size, positions, message", [(300, 16, "--sequence-length"), (299, 64, "299 logits")]
)
def test_a_teacher_of_another_shape_is_refused(
    data_folder, tokenizer, tmp_path, capsys, vocabulary_size, positions, message
):
    teacher = models.build_model("gpt2-tiny", vocabulary_size, max_position_embeddings=positions)
    save_model(tmp_path / "t.pt", teacher, tokenizer, "gpt2-tiny")
    arguments = ("--teachers", tmp_path / "t.pt", "--data", data_folder)
    assert message in refused(capsys, tmp_path / "s", *arguments)


def test_rows_of_a_padded_vocabulary_are_left_out(data_folder, tokenizer, tmp_path, capsys):
    """Of a teacher and of --init: the other rows are those of the checkpoint, and logits have 300."""
    for name in ("gpt2-tiny", "llama-tiny"):
        padded = models.build_model(name, 320).eval()
        path = tmp_path / f"{name}.pt"
        save_model(path, padded, tokenizer, name, length=32)
        loaded, _ = models.load_compatible(path, open_corpus(data_folder))
        tokens = torch.randint(300, (2, 9))
        torch.testing.assert_close(loaded(tokens), padded(tokens)[..., :300])
        arguments = ["--teachers", str(path), "--init", str(path), "--data", str(data_folder)]
        assert distill.main([*arguments, "--out", str(tmp_path / "s" / name), *SHORT]) == 0
        assert "20 rows beyond the tokenizer's 300 pieces are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--teacher-weights", "1"], "--teacher-weights"),
        (["--teacher-weights", "-1", "2"], "--teacher-weights"),
        (["--teacher-weights", "nan", "2"], "--teacher-weights"),
    ],
)
def test_impossible_options_are_refused(teachers, data_folder, tmp_path, capsys, arguments, message):
    given = ("--teachers", *teachers, "--data", data_folder, *arguments)
    assert message in refused(capsys, tmp_path / "s", *given)


@pytest.mark.parametrize("arguments", [["--alpha", "1.5"], ["--temperature", "0"], []])
def test_wrong_usage_exits_with_2(arguments):
    given = ["--teachers", "a.pt", *arguments] if arguments else []
    with pytest.raises(SystemExit) as stop:
        distill.main(given)
    assert stop.value.code == 2


def test_what_is_no_teacher_is_named_with_the_way_in(data_folder, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    paths = {data_folder / "train.bin": "no checkpoint", tmp_path / "hf": "export_hf.py --import"}
    for path, message in (paths | {tmp_path / "none.pt": "does not exist"}).items():
        error = refused(capsys, tmp_path / "s", "--teachers", path, "--data", data_folder)
        assert str(path) in error and message in error


def test_a_checkpoint_is_no_teacher_cache(teachers, data_folder, tmp_path, capsys):
    """It must not be called a damaged cache: the remedy for that is to delete it."""
    before = Path(teachers[0]).read_bytes()
    given = ("--teachers", *teachers, "--data", data_folder, "--cache-teachers", teachers[0])
    error = refused(capsys, tmp_path / "s", *given)
    assert "is no teacher cache" in error and "delete" not in error
    assert Path(teachers[0]).read_bytes() == before
