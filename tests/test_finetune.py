import json
import os
import random
import signal
from itertools import combinations, product

import numpy as np
import pytest
import torch
import transformers

import export_hf
import finetune
import model as models
import train
from benchmarks.reference import hugging_face_class_logits
from conftest import interrupt_after, save_model, step_of, write_text
from finetuning import classifier, tasks
from finetuning.tasks import confusion, encode_examples, read_tasks, scores
from generate import main as generate_main
from gpt2 import GPT2Config
from llama import LlamaConfig
from tokenizer import Tokenizer
from training.checkpoint import read_checkpoint
from training.io import UserError, run_program

V = 300
SHAPES = {
    "gpt2": GPT2Config(V, 48, 192, 3, 4, max_position_embeddings=40, dropout=0.0),
    "llama": LlamaConfig(V, 48, 80, 3, 4, max_position_embeddings=40),
}
kinds = pytest.mark.parametrize("kind", SHAPES)


def language_model(kind, seed=0):
    """A model none of whose parameters is the constant that it was initialised with."""
    torch.manual_seed(seed)
    model = models.build(SHAPES[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def write_task(folder, name, train, valid):
    """Writes a task's two files, from lists of objects."""
    folder.mkdir(exist_ok=True)
    for part, entries in (("train", train), ("valid", valid)):
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / f"{name}.{part}.jsonl").write_text(lines)


def drawn(count, seed, pairs=False, names=(0, 1)):
    """Examples whose class says whether a text begins and ends with a river."""
    generator, examples = random.Random(seed), []
    for i in range(count):
        words = write_text(generator.randint(3, 14), seed * 1000 + i).replace("river", "dog")
        label = generator.randint(0, 1)
        text = " ".join([("child", "river")[label], words, ("child", "river")[label]])
        fields = {"sentence1": "the cat runs", "sentence2": text} if pairs else {"text": text}
        examples.append(fields | {"label": names[label]})
    return examples


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two tasks that can be learned, one of texts and one of pairs."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "single", drawn(96, 1), drawn(40, 2))
    write_task(folder, "double", drawn(64, 3, pairs=True), drawn(30, 4, pairs=True))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer):
    """{architecture: a checkpoint that nothing has trained}."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in SHAPES:
        save_model(folder / f"{kind}.pt", language_model(kind), tokenizer, name=kind)
    return {kind: folder / f"{kind}.pt" for kind in SHAPES}


def finetuned(*arguments):
    """The exit code of finetune.py with quick settings."""
    quick = ["--learning-rate", "3e-3", "--batch-size", "16", "--epochs", "4", "--device", "cpu"]
    return run_program(lambda: finetune.main([*map(str, arguments), *quick]))


def results(out):
    """{path in `out`: result}, but for times."""
    results = {str(p.relative_to(out)): json.loads(p.read_text()) for p in out.glob("*/*/*.json")}
    return {path: {k: v for k, v in r.items() if k != "seconds"} for path, r in results.items()}


# ---- equal to transformers


def twin_of(model, classes):
    """Transformers' classifier with the same weights."""
    kind = models.architecture(model.config)
    fields = export_hf.hf_config(model, kind, classes)
    config = transformers.AutoConfig.for_model(**fields)
    twin = transformers.AutoModelForSequenceClassification.from_config(config)
    assert type(twin).__name__ == fields["architectures"][0]
    missing, unexpected = twin.load_state_dict(export_hf.hf_weights(kind, model.state_dict()), strict=False)
    assert not missing and not unexpected
    return twin.eval()


def random_batch(seed, lengths=(3, 17, 9, 40)):
    """A batch of examples of three classes."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, V, (n,), generator=generator).tolist() for n in lengths]
    labels = torch.randint(3, (len(ids),), generator=generator)
    return tasks.EncodedExamples(ids, labels, 0, 0).batch(list(range(len(ids)))), labels


@kinds
def test_logits_loss_and_ten_steps_are_those_of_transformers(kind):
    # With seed 0 one gradient is 1e-9, near AdamW's epsilon, so that rounding decides its step.
    model = classifier.as_classifier(language_model(kind, seed=1), 3)
    twin = twin_of(model, ["no", "maybe", "yes"])
    step = step_of(finetune.ClassificationObjective(model))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 1, 10)
    for i in range(10):
        batch, labels = random_batch(i)
        mask = (batch.tokens != 0).long()
        theirs = twin(batch.tokens, attention_mask=mask, labels=labels)
        last = mask.sum(1) - 1
        ours = classifier.class_logits(model, batch.tokens, last)
        assert (ours - theirs.logits).abs().max() <= 1e-5 * theirs.logits.abs().max()
        theirs.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        terms = step(batch, train.learning_rate(i, 10, 1e-3, 1, schedule="linear"))
        assert terms["loss"].item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        assert terms["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@kinds
def test_the_exported_folder_predicts_what_finetune_reported(kind, folder, checkpoints, tmp_path):
    """Also in the files of --predictions, which are those of BabyLM's pipelines."""
    out = tmp_path / "out"
    options = ["--keep", "--max-length", 12, "--predictions", tmp_path / "main"]
    assert finetuned(checkpoints[kind], "--tasks", folder, "--out", out, *options) == 0
    for task in read_tasks(folder):
        best = out / kind / task.name / "seed-0" / "best.pt"
        logits = hugging_face_class_logits(best, task.valid[task.name].texts, 12)
        predictions = logits.argmax(1).tolist()
        result = results(out)[f"{kind}/{task.name}/seed-0.json"]
        assert " ".join(map(str, predictions)) == result["predictions"][task.name]
        assert len(set(predictions)) == 2
        path = tmp_path / "main" / "finetune" / task.name / "predictions.json"
        expected = [{"id": f"{task.name}_{i}", "pred": p} for i, p in enumerate(predictions)]
        assert json.loads(path.read_text()) == {task.name: {"predictions": expected}}
    assert export_hf.main([str(best), "--out", str(tmp_path / "hf")]) is None
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"}


def test_long_texts_are_cut_as_the_exported_tokenizer_does(checkpoints, tokenizer, tmp_path):
    export_hf.export(checkpoints["llama"], tmp_path / "hf")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    generator = random.Random(0)
    pairs = [tuple(write_text(generator.randint(1, 12), i + j) for j in (0, 500)) for i in range(60)]
    for texts in (pairs, [(a,) for a, _ in pairs]):
        for length in (3, 8, 9, 30):
            examples = tasks.Examples(texts, [0] * len(texts), 0, "")
            ours = encode_examples(examples, tokenizer, length)
            columns = [list(column) for column in zip(*texts)]
            assert ours.ids == reader(*columns, truncation=True, max_length=length)["input_ids"]
            joined = reader(*columns)["input_ids"]
            assert ours.num_cut == sum(len(ids) > length for ids in joined)


# ---- tasks


WSC = ('Does "B" refer to "A" in this passage?', "C")


@pytest.mark.parametrize(
    "fields, texts",
    [
        ({"sentence": "A"}, ("A",)),  # CoLA, SST-2, MSGS
        ({"sentence1": "A", "sentence2": "B"}, ("A", "B")),  # MRPC, RTE
        ({"question1": "A", "question2": "B"}, ("A", "B")),  # QQP
        ({"premise": "A", "hypothesis": "B"}, ("A", "B")),  # MNLI
        ({"question": "A", "sentence": "B"}, ("A", "B")),  # QNLI
        ({"question": "A", "passage": "B"}, ("A", "B")),  # BoolQ
        ({"paragraph": "C", "question": "A", "answer": "B"}, ("Question: A Answer: B", "C")),
        ({"text": "C", "span1_text": "A", "span2_text": "B", "span1_index": 1}, WSC),
        ({"text": "C", "target": {"span1_text": "A", "span2_text": "B", "span2_index": 1}}, WSC),
        ({"sentence": "A", "linguistic_feature_type": "syntactic", "UID": "x"}, ("A",)),  # MSGS
        ({"text_a": "A", "text_b": "B"}, ("A", "B")),
        ({"text": "A {sentence}"}, ("A {sentence}",)),
    ],
)
def test_fields_become_texts_as_in_the_pipelines(tmp_path, fields, texts):
    write_task(tmp_path, "t", [fields | {"label": i, "idx": i} for i in (0, 1)], [fields | {"label": 1}])
    (task,) = read_tasks(tmp_path)
    assert task.train.texts == [texts, texts] and task.valid["t"].labels == [1]
    assert task.unused_fields == []


def test_fields_and_files_that_are_not_used_are_named(tmp_path, checkpoints, capsys):
    entries = [entry | {"word": "river", "idx": 3} for entry in drawn(20, 1)]
    write_task(tmp_path / "in", "wic", entries, entries)
    (tmp_path / "in" / "wic.TRAIN.jsonl.gz").touch()
    assert finetuned(checkpoints["llama"], "--tasks", tmp_path / "in", "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "wic: these fields are not part of the text: word\n" in error
    assert "not read: wic.TRAIN.jsonl.gz\n" in error


def test_classes_are_the_train_files_in_order(tmp_path):
    entries = [{"text": "x", "label": label} for label in (10, 2, "yes", 2, "no")]
    write_task(tmp_path, "t", entries, [{"text": "x", "label": "yes"}])
    (task,) = read_tasks(tmp_path)
    assert task.classes == ("2", "10", "no", "yes")
    assert task.train.labels == [1, 0, 3, 0, 2] and task.valid["t"].labels == [3]


def test_files_may_be_named_as_in_2023_and_labels_written_as_others_do(tmp_path):
    lines = [
        '{"premise": "A", "hypothesis": "B", "label": 1.0}',
        '{"premise": "", "hypothesis": "B", "label": " 0"}',
    ]
    for name in ("train", "validation_matched", "validation_mismatched"):
        (tmp_path / f"mnli.{name}.json").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    (tmp_path / "other.train.jsonl").touch()  # is not asked for
    (task,) = read_tasks(tmp_path, ["mnli"])
    assert task.classes == ("0", "1") and set(task.valid) == {"mnli", "mnli-mm"}
    assert task.train.texts == [("A", "B"), ("", "B")] and task.train.labels == [1, 0]


GOOD = '{"text": "a dog", "label": 0}\n{"text": "a cat", "label": 1}\n'
PAIR = '{"text_a": "a", "text_b": "b", "label": 1}'


@pytest.mark.parametrize(
    "train_lines, valid_lines, message",
    [
        (GOOD, None, "holds no t.valid.jsonl"),
        (None, GOOD, "holds no t.train.jsonl"),
        (GOOD, "", "t.valid.jsonl is empty"),
        (GOOD, '{"text": "a", "label": 2}', "line 1: the class 2 never occurs in the train file (0, 1)"),
        (GOOD + '{"text": " ", "label": 1}', GOOD, "line 3: text must be text, and not empty"),
        (GOOD + '{"text": ["a"], "label": 1}', GOOD, "line 3: text must be text, and not empty"),
        (GOOD + '{"text": "a", "label": -1}', GOOD, "line 3: the label -1 is no class"),
        (GOOD + '{"text": "a", "label": 0.5}', GOOD, "line 3: the label 0.5 is no class"),
        (GOOD + '{"text": "a"}', GOOD, 'line 3: it is no JSON object with a "label"'),
        (GOOD + '{"words": "a", "label": 1}', GOOD, "line 3: it has none of these sets of fields: "),
        (GOOD + PAIR, GOOD, "line 3: it has text_a, text_b, and the task's first line has text:"),
        (GOOD, PAIR, "t.valid.jsonl, line 1: it has text_a, text_b, and the task's first line has text:"),
        (GOOD + '{"text": "a\\ud800", "label": 1}', GOOD, "line 3: 'utf-8' codec can't encode"),
        (GOOD + "[" * 100_000, GOOD, "line 3: "),
        (GOOD + "text", GOOD, "line 3: it is no JSON object"),
        (GOOD.replace("1", "0"), GOOD, "t.train.jsonl has 1 classes"),
        ("".join(f'{{"text": "a", "label": {i}}}\n' for i in range(101)), GOOD, "101 classes"),
    ],
)
def test_a_task_that_cannot_be_learned_is_one_line(
    tmp_path, checkpoints, capsys, train_lines, valid_lines, message
):
    for part, lines in (("train", train_lines), ("valid", valid_lines)):
        if lines is not None:
            (tmp_path / f"t.{part}.jsonl").write_text(lines)
    assert finetuned(checkpoints["llama"], "--tasks", tmp_path, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and str(tmp_path) in error


def test_a_task_is_read_once_and_a_link_to_nothing_is_an_error(folder, tmp_path):
    tasks_read = read_tasks(folder, ["single", "double", "single"])
    assert [task.name for task in tasks_read] == ["single", "double"]
    (tmp_path / "t.train.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a link to nothing"):
        read_tasks(tmp_path)


def test_a_mismatched_part_is_scored_with_the_models_of_the_task(checkpoints, tmp_path, capsys):
    write_task(tmp_path / "in", "mnli", drawn(40, 1), drawn(20, 2))
    lines = [json.dumps(entry) for entry in drawn(10, 5)]
    (tmp_path / "in" / "mnli-mm.valid.jsonl").write_text("\n".join(lines))
    assert finetuned(checkpoints["llama"], "--tasks", tmp_path / "in", "--out", tmp_path / "o") == 0
    (result,) = results(tmp_path / "o").values()
    assert set(result["scores"]) == {"mnli", "mnli-mm"}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mnli-mm", "accuracy", "10", "60.0"] in [row[:4] for row in rows]


# ---- scores


def test_scores_are_those_of_their_definitions():
    generator = np.random.default_rng(0)
    for _ in range(20):
        labels, predictions = generator.integers(2, size=(2, 50))
        table = confusion(torch.tensor(predictions), torch.tensor(labels), 2)
        assert scores(table)["accuracy"] == pytest.approx((labels == predictions).mean())
        assert scores(table)["mcc"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1])
        for positive in (0, 1):
            precision = (labels[predictions == positive] == positive).mean()
            recall = (predictions[labels == positive] == positive).mean()
            f1 = 2 * precision * recall / (precision + recall)
            assert scores(table, positive)["f1"] == pytest.approx(f1)


def test_matthews_correlation_of_several_classes_is_that_of_their_indicators():
    labels, predictions = np.random.default_rng(1).integers(3, size=(2, 60))
    is_label, is_prediction = (m - m.mean(0) for m in (np.eye(3)[labels], np.eye(3)[predictions]))  # (N, C)
    expected = (is_label * is_prediction).sum() / np.sqrt((is_label**2).sum() * (is_prediction**2).sum())
    result = scores(confusion(torch.tensor(predictions), torch.tensor(labels), 3))
    assert result["mcc"] == pytest.approx(expected) and "f1" not in result


def test_predicting_one_class_always_correlates_with_nothing(tmp_path):
    entries = [{"text": "x", "label": label} for label in (1, 1, 0)]
    write_task(tmp_path, "t", entries, entries + entries[:1])
    (task,) = read_tasks(tmp_path)
    majority = tasks.majority_scores(task, "t")
    assert majority == {"accuracy": 0.75, "mcc": 0.0, "f1": pytest.approx(6 / 7)}
    assert scores(confusion(torch.zeros(4, dtype=int), torch.ones(4, dtype=int), 2))["f1"] == 0


@pytest.mark.parametrize(
    "task, names", [("mrpc", ("not_equivalent", "equivalent")), ("QQP", ("no", "Duplicate"))]
)
def test_the_f1_of_words_is_that_of_numbers(task, names, checkpoints, tmp_path, capsys):
    for folder, labels in (("numbers", (0, 1)), ("words", names)):
        write_task(tmp_path / folder, task, drawn(64, 3, True, labels), drawn(30, 4, True, labels))
    arguments = [checkpoints["llama"], "--tasks", tmp_path / "words", "--out", tmp_path / "out"]
    assert finetuned(*arguments) == 0
    assert f"f1 of {names[1]}" in capsys.readouterr().out
    (result,) = results(tmp_path / "out").values()
    predictions = [result["classes"][int(i)] == names[1] for i in result["predictions"][task].split()]
    (numbers,) = read_tasks(tmp_path / "numbers")
    assert result["scores"][task] == numbers.scores(task, torch.tensor(predictions).long())


def test_an_f1_of_no_known_class_is_refused(tmp_path):
    write_task(tmp_path, "mrpc", drawn(8, 1, names=("same", "other")), drawn(8, 2, names=("same", "other")))
    with pytest.raises(UserError, match='F1 of mrpc is that of "equivalent", 1, true or yes'):
        read_tasks(tmp_path)


def test_the_interval_over_texts_is_that_of_drawing_them_again():
    generator = np.random.default_rng(2)
    labels = generator.integers(2, size=80)
    predictions = np.where(generator.random(80) < 0.8, labels, 1 - labels)
    table = confusion(torch.tensor(predictions), torch.tensor(labels), 2)
    values = []
    for _ in range(2000):
        resample = generator.integers(80, size=80)
        values.append(np.corrcoef(labels[resample], predictions[resample])[0, 1])
    expected = pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.03)
    assert tasks.bootstrap_interval(table, "mcc") == expected


# ---- batches


@pytest.fixture(scope="module")
def stream():
    generator = random.Random(0)
    ids = [[5] * generator.randint(1, 100) for _ in range(500)]
    return finetune.ExampleStream(
        tasks.EncodedExamples(ids, torch.zeros(500, dtype=int), 0, 0), batch_size=16, seed=0
    )


def test_every_example_is_seen_once_an_epoch_and_the_order_is_the_seeds(stream):
    for epoch in (0, 1):
        steps = range(epoch * stream.num_batches, (epoch + 1) * stream.num_batches)
        seen = [i for step in steps for i in stream(step).chunk_ids.tolist()]
        assert sorted(seen) == list(range(500))
    again = finetune.ExampleStream(stream.examples, 16, seed=0)
    other = finetune.ExampleStream(stream.examples, 16, seed=1)
    assert again.order(1) == stream.order(1) != stream.order(0)
    assert other.order(1) != stream.order(1)


def test_two_epochs_have_other_batches_and_their_short_one_other_texts(stream):
    def together(epoch):
        return {frozenset(pair) for b in stream.order(epoch) for pair in combinations(b, 2)}

    one, two = together(0), together(1)
    assert len(one & two) < 0.3 * len(one)  # in one pool it would be nearly all
    short = [next(set(b) for b in stream.order(epoch) if len(b) < 16) for epoch in (0, 1)]
    assert len(short[0] & short[1]) < 2


def test_hardly_a_token_is_padding(stream):
    batches = [stream(step) for step in range(stream.num_batches)]
    padded = sum(batch.tokens.numel() for batch in batches)
    real = sum(int((batch.tokens > 0).sum()) for batch in batches)
    assert real == stream.num_tokens and padded < 1.15 * real


# ---- the program


def test_a_task_is_learned_and_nothing_is_done_twice(folder, checkpoints, tmp_path, capsys, monkeypatch):
    arguments = [checkpoints["llama"], checkpoints["gpt2"], "--tasks", folder, "--seeds", 2]
    arguments += ["--out", tmp_path / "out", "--json", tmp_path / "table.json"]
    assert finetuned(*arguments) == 0
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    for model, task in product(("llama", "gpt2"), ("single", "double")):
        score, majority = table["models"][model][task], table["tasks"][task]["majority"]
        values = [score["seeds"][seed]["accuracy"] for seed in ("0", "1")]
        assert min(values) > majority + 0.1 and score["mean"] == sum(values) / 2
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert files == {
        f"{m}/{t}/seed-{s}.json" for m in checkpoints for t in ("single", "double") for s in (0, 1)
    }
    monkeypatch.setattr(finetune, "fit", None)
    assert finetuned(*arguments) == 0
    assert capsys.readouterr().out == "\n" + printed.split("\n\n")[1]
    other = ["--tasks", folder, "--out", tmp_path / "out", "--head", "mlp"]
    assert finetuned(checkpoints["llama"], *other) == 1
    assert "of another run (head: linear -> mlp): choose" in capsys.readouterr().err


def test_a_run_that_was_stopped_continues_with_the_same_bits(
    folder, checkpoints, tmp_path, monkeypatch, capsys
):
    arguments = [checkpoints["gpt2"], "--tasks", folder, "--only", "double", "--head", "mlp"]
    assert finetuned(*arguments, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        interrupt_after(patched, 7)
        assert finetuned(*arguments, "--out", tmp_path / "parts") == 128 + signal.SIGTERM
    assert "stopped after 0 of 1 runs: the same command continues" in capsys.readouterr().out
    assert not results(tmp_path / "parts")
    for step in (8, 9):  # however short the time, each command takes a step
        assert finetuned(*arguments, "--out", tmp_path / "parts", "--stop-after", 0) == 0
        state = tmp_path / "parts" / "gpt2" / "double" / "seed-0" / "checkpoint.pt"
        assert read_checkpoint(state)["progress"]["step"] == step and not results(tmp_path / "parts")
    assert finetuned(*arguments, "--out", tmp_path / "parts") == 0
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_signal_in_the_last_step_of_a_run_ends_the_command_too(folder, checkpoints, tmp_path, monkeypatch):
    arguments = [checkpoints["llama"], "--tasks", folder, "--out", tmp_path]
    with monkeypatch.context() as patched:
        interrupt_after(patched, 16)  # the 64 examples of the first task, four times
        assert finetuned(*arguments) == 128 + signal.SIGTERM
    assert list(results(tmp_path)) == ["llama/double/seed-0.json"]


def test_results_of_other_runs_are_refused_before_anything_is_trained(
    checkpoints, tmp_path, capsys, monkeypatch
):
    arguments = [checkpoints["llama"], "--tasks", tmp_path / "in", "--out", tmp_path, "--precision", "fp32"]
    write_task(tmp_path / "in", "t", drawn(20, 1), drawn(8, 2))
    assert finetuned(*arguments) == 0
    path = tmp_path / "llama" / "t" / "seed-0.json"
    result = json.loads(path.read_text())
    monkeypatch.setattr(finetune, "fit", None)
    for option, message in (
        ("--keep", "was made without it: move it away"),
        ("--precision=bf16", "precision: fp32 -> bf16"),
        ("--max-length=9", "settings.max_length: 40 -> 9"),
        ("--seeds=2 --predictions=main", "takes one checkpoint and one seed"),
    ):
        assert finetuned(*arguments, *option.split()) == 1
        assert message in capsys.readouterr().err
    for edited in (result | {"predictions": 0}, result | {"predictions": {"t": "0 7"}}, []):
        path.write_text(json.dumps(edited))
        assert finetuned(*arguments) == 1
        assert f"{path} is no result of this program" in capsys.readouterr().err
    path.write_text(json.dumps(result))
    write_task(tmp_path / "in", "t", drawn(20, 1), drawn(8, 3))  # other text under the same name
    assert finetuned(*arguments) == 1
    assert "is of another run (files.t changed): choose another" in capsys.readouterr().err


def test_a_finished_run_removes_its_own_files_alone(folder, checkpoints, tmp_path, monkeypatch):
    arguments = [checkpoints["llama"], "--tasks", folder, "--only", "single", "--out", tmp_path]
    with monkeypatch.context() as patched:  # a kill right after the result was written
        patched.setattr(finetune, "remove_checkpoints", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert finetuned(*arguments) == 130
    run = tmp_path / "llama" / "single" / "seed-0"
    (run / "notes.txt").write_text("years of work")
    (run / "exported").mkdir()
    assert (run / "best.pt").exists()
    monkeypatch.setattr(finetune, "fit", None)
    assert finetuned(*arguments) == 0
    assert sorted(path.name for path in run.iterdir()) == ["exported", "notes.txt"]
    (run / "best.pt").write_text("of something else")
    assert finetuned(*arguments) == 0 and (run / "best.pt").exists()  # no log.jsonl: no run's folder


def test_what_was_kept_stays_when_the_command_is_repeated_without_keep(folder, checkpoints, tmp_path):
    arguments = [checkpoints["llama"], "--tasks", folder, "--only", "single", "--out", tmp_path]
    assert finetuned(*arguments, "--keep") == 0
    (path,) = tmp_path.glob("*/*/*.json")
    for _ in range(2):
        assert finetuned(*arguments) == 0
        assert {p.name for p in path.with_suffix("").iterdir()} == {"best.pt", "log.jsonl"}
        result = json.loads(path.read_text())
        result.pop("kept", None)  # results of earlier versions do not say it
        path.write_text(json.dumps(result))


def test_patience_ends_a_run_and_the_best_score_is_kept(folder, checkpoints, tmp_path):
    arguments = [checkpoints["llama"], "--tasks", folder, "--only", "single", "--keep"]
    assert finetuned(*arguments, "--out", tmp_path, "--patience", 2, "--eval-every", 1) == 0
    run = tmp_path / "llama" / "single" / "seed-0"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines if "score" in line]
    result = results(tmp_path)["llama/single/seed-0.json"]
    best = scores.index(max(scores))
    assert len(scores) == result["steps"] == best + 3 < 24 and result["best_step"] == best + 1
    progress = read_checkpoint(run / "best.pt")["progress"]
    assert progress["score"] == max(scores) == result["scores"]["single"]["f1"]


def test_the_head_of_2025_is_trained_and_stays_here(folder, checkpoints, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--only", "double", "--settings", "2025", "--head", "mlp", "--keep", "--out", out]
    assert finetuned(checkpoints["llama"], "--tasks", folder, *arguments) == 0
    (result,) = results(out).values()
    assert result["settings"]["schedule"] == "cosine" and result["settings"]["max_length"] == 40
    best = out / "llama" / "double" / "seed-0" / "best.pt"
    model, _ = classifier.load_classifier(best)
    linear = model.score[1]
    hidden = torch.randn(5, 48)
    normed = torch.nn.functional.layer_norm(hidden, (48,))
    inner = torch.nn.functional.gelu(linear(normed))
    expected = model.score[5](torch.nn.functional.layer_norm(inner, (48,)))
    assert torch.allclose(model.score(hidden), expected, atol=1e-6)
    assert run_program(lambda: export_hf.main([str(best), "--out", str(tmp_path / "hf")])) == 1
    assert "has a head of several layers" in capsys.readouterr().err


def test_a_classifier_is_no_language_model(folder, checkpoints, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetuned(checkpoints["llama"], "--tasks", folder, "--keep", "--out", out) == 0
    best = out / "llama" / "single" / "seed-0" / "best.pt"
    for program in (
        lambda: generate_main([str(best), "--prompt", "the"]),
        lambda: finetune.main([str(best), "--tasks", str(folder)]),
    ):
        assert run_program(program) == 1
        assert f"{best} is a classifier and predicts no tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a language model"):
        classifier.load_classifier(checkpoints["llama"])


def test_checkpoints_have_names_of_their_own():
    seeds = ["runs/seed-1/student/best.pt", "runs/seed-2/student/best.pt"]
    assert finetune.checkpoint_names(["runs/a/best.pt", "runs/b/checkpoint.pt"]) == ["a", "b"]
    assert finetune.checkpoint_names(seeds) == ["seed-1-student", "seed-2-student"]
    assert finetune.checkpoint_names(["runs/a/best.pt", "runs/a/checkpoint.pt"]) == ["best", "checkpoint"]
    with pytest.raises(UserError, match="is given twice"):
        finetune.checkpoint_names(["runs/a/best.pt", "runs/b/../a/best.pt"])


def test_texts_that_are_cut_are_told(folder, checkpoints, tmp_path, capsys):
    arguments = ["--only", "single", "--max-length", 6, "--out", tmp_path]
    assert finetuned(checkpoints["llama"], "--tasks", folder, *arguments) == 0
    (task,) = read_tasks(folder, ["single"])
    tokenizer = Tokenizer.of_checkpoint(read_checkpoint(checkpoints["llama"]), "it")
    texts = [text for (text,) in task.train.texts + task.valid["single"].texts]
    cut = sum(len(ids) > 6 for ids in tokenizer.encode(texts))
    assert f"single: {cut:,} of 136 texts are longer than 6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--seeds=0", "--max-length=2", "--batch-size=0", "--learning-rate=nan", "--head=deep"]
)
def test_wrong_usage_exits_with_2(option):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["best.pt", "--tasks", "x", option])
    assert stop.value.code == 2
