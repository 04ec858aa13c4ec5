"""Scores are what their definitions say: on a uniform model, on hand-made pairs, file by file."""

import itertools
import json
import math
import os
import shutil

import pytest
import torch
from torch import nn

import evaluate
import model as models
from conftest import save_model, train_tokenizer, write_split, write_text
from data import TokenShard
from evaluate import (
    CONVENTIONS,
    Ensemble,
    Scaled,
    accuracies,
    corpus_scores,
    fitted_temperature,
    pair_scores,
    read_pairs,
    sentence_scores,
    shard_losses,
)
from evaluation.statistics import mean_loss, read_losses
from tokenizer import BOS, EOS
from training.io import UserError, run_program

V = 300


class Fixed(nn.Module):
    """A model whose next-token logits are a given table (V, V), row by the last token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.max_position_embeddings = 64

    def forward(self, tokens):
        return self.logits[tokens]


def uniform():
    return Fixed(torch.zeros(V, V))


def scores_of(model, shard, sequence_length):
    return corpus_scores(shard, shard_losses(model, shard, sequence_length))


@pytest.fixture
def dev_shard(data_folder):
    return TokenShard(data_folder / "dev.bin")


def test_a_uniform_models_perplexity_is_the_vocabulary_size(dev_shard):
    scores = scores_of(uniform(), dev_shard, 32)
    assert math.isclose(scores["perplexity"], V, rel_tol=1e-5)
    assert math.isclose(scores["cross_entropy"], math.log(V), rel_tol=1e-6)
    targets = len(dev_shard.tokens) - 1
    words = math.exp(targets * math.log(V) / dev_shard.words)
    assert math.isclose(scores["perplexity_per_word"], words, rel_tol=1e-5)
    bits = targets * math.log2(V) / dev_shard.bytes
    assert math.isclose(scores["bits_per_byte"], bits, rel_tol=1e-5)


@pytest.mark.parametrize("sequence_length", [7, 32, 10_000])
def test_every_token_but_the_first_is_scored_once(dev_shard, sequence_length):
    """A model without memory gives the same total however the text is cut."""
    torch.manual_seed(0)
    model = Fixed(torch.randn(V, V))
    got = scores_of(model, dev_shard, sequence_length)
    ids = torch.from_numpy(dev_shard.tokens.astype("int64"))
    losses = nn.functional.cross_entropy(model.logits[ids[:-1]], ids[1:], reduction="none")
    assert math.isclose(got["cross_entropy"], losses.mean().item(), rel_tol=1e-5)
    for file in dev_shard.files:
        part = losses[max(file.start - 1, 0) : file.stop - 1]
        ours = got["per_file"][file.name]["cross_entropy"]
        assert math.isclose(ours, part.mean().item(), rel_tol=1e-5)


def test_sentences_are_scored_after_a_newline_whatever_their_neighbours(tokenizer):
    torch.manual_seed(0)
    model = models.build_model("llama-tiny", V).eval()
    sentences = ["the cat runs", "a", "the old dog sees the small garden", "the cat runs", "and"]
    together = sentence_scores(model, tokenizer, sentences)
    for sentence, score in zip(sentences, together):
        ids = torch.tensor([tokenizer.encode("\n") + tokenizer.encode(sentence)])
        log_p = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).sum()
        torch.testing.assert_close(score.float(), log_p, rtol=1e-5, atol=1e-4)


PAIRS = [
    {"sentence_good": "a cat", "sentence_bad": "a dog", "linguistics_term": "s-selection"},
    {"sentence_good": "a dog", "sentence_bad": "a cat", "linguistics_term": "argument_structure"},
    {"sentence_good": "a dog", "sentence_bad": "a dog", "linguistics_term": "binding"},
]


def write_pairs(folder, pairs, name="hand_made"):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def prefers(tokenizer, word):
    """A model that expects the pieces of " word" everywhere, and hardly any other."""
    logits = torch.zeros(V, V)
    logits[:, tokenizer.encode(f" {word}")] = 20.0
    return Fixed(logits)


def test_hand_made_pairs_have_the_accuracy_they_must(tokenizer, tmp_path):
    pairs = read_pairs(write_pairs(tmp_path / "p", PAIRS))
    scores = accuracies(pairs, pair_scores(prefers(tokenizer, "cat"), tokenizer, pairs))
    assert scores["per_file"] == {"hand_made": 0.5}  # right, wrong, and half for a tie
    assert scores["per_field"] == {"argument_structure": 0.5, "binding": 0.5}
    assert math.isclose(scores["tie_rate"], 1 / 3)
    pairs = {"f": pairs["hand_made"][2:]}
    all_ties = accuracies(pairs, pair_scores(uniform(), tokenizer, pairs))
    assert (all_ties["accuracy_over_files"], all_ties["tie_rate"]) == (0.5, 1.0)


def test_both_means_are_means_of_their_kind(tokenizer, tmp_path):
    folder = write_pairs(tmp_path / "p", PAIRS[:1], "one")
    write_pairs(folder, PAIRS[1:2] * 3, "two")
    pairs = read_pairs(folder)
    scores = accuracies(pairs, pair_scores(prefers(tokenizer, "cat"), tokenizer, pairs))
    assert scores["per_file"] == {"one": 1.0, "two": 0.0}
    assert scores["accuracy_over_files"] == 0.5
    assert scores["accuracy_over_fields"] == 0.25  # one field of four pairs


def test_the_ensemble_averages_logits():
    tokens = torch.randint(V, (2, 6))
    members = [models.build_model(n, V).eval() for n in ("gpt2-tiny", "llama-tiny")]
    expected = (members[0](tokens) + members[1](tokens)) / 2
    torch.testing.assert_close(Ensemble(members)(tokens), expected)


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b'{"sentence_good": "x"}',
        b'{"sentence_good": "", "sentence_bad": "a"}',
        rb'{"sentence_good": "\ud800", "sentence_bad": "a"}',
        b"{",
        b"\xff",
        b"17",
        b'{"sentence_good": "' + b"a " * (1 << 19) + b'", "sentence_bad": "b"}',
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    folder = write_pairs(tmp_path / "p", PAIRS)
    with open(folder / "hand_made.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"hand_made\.jsonl, line 4"):
        read_pairs(folder)


def test_a_folder_without_pairs_is_refused(tmp_path):
    os.mkfifo(tmp_path / "nobody_writes_here.jsonl")
    with pytest.raises(UserError, match=r"no \*\.jsonl"):
        read_pairs(tmp_path)


def test_conventions_differ_in_what_precedes_a_sentence(tokenizer):
    """A table of log-probabilities by the last token alone shows which tokens were predicted."""
    torch.manual_seed(0)
    model = Fixed(torch.randn(V, V))
    log_p, ids = model.logits.detach().log_softmax(-1), tokenizer.encode("the cat")
    blank = tokenizer.encode(" the cat")
    chains = {
        "newline": [*tokenizer.encode("\n"), *ids],
        "2023": [EOS, *ids],
        "2024": [BOS, *blank],
        "2025": ids,
        "bos": [BOS, *ids],
    }
    assert chains.keys() == CONVENTIONS.keys()
    for convention, chain in chains.items():
        (score,) = sentence_scores(model, tokenizer, ["the cat"], convention)
        expected = sum(log_p[a, b] for a, b in itertools.pairwise(chain))
        assert math.isclose(score, expected, rel_tol=1e-5), convention


def test_a_single_token_without_context_is_no_evidence(tokenizer):
    assert len(tokenizer.encode("a")) == 1
    assert sentence_scores(uniform(), tokenizer, ["a"], "2025").tolist() == [0.0]


def test_a_sentence_beyond_the_context_is_refused(tokenizer):
    with pytest.raises(UserError, match="longer than the model's context"):
        sentence_scores(uniform(), tokenizer, ["the cat " * 100])


# ---- the program


@pytest.fixture
def checkpoints(tokenizer, tmp_path):
    paths = []
    for name in ("gpt2-tiny", "llama-tiny"):
        torch.manual_seed(0)
        model = models.build_model(name, V)
        save_model(tmp_path / f"{name}.pt", model, tokenizer, name, length=32)
        paths.append(str(tmp_path / f"{name}.pt"))
    return paths


def test_several_checkpoints_and_their_ensemble_side_by_side(checkpoints, data_folder, tmp_path, capsys):
    pairs = str(write_pairs(tmp_path / "pairs", PAIRS))
    arguments = [*checkpoints, "--ensemble", *checkpoints, "--data", str(data_folder)]
    arguments += ["--pairs", pairs, "--json", str(tmp_path / "s.json"), "--device", "cpu"]
    assert run_program(lambda: evaluate.main(arguments)) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("gpt2-tiny", "llama-tiny", "ensemble"))
    entries = json.loads((tmp_path / "s.json").read_text())["checkpoints"]
    assert len(entries) == 3
    for entry in entries:
        assert entry.keys() == {
            "path",
            "model",
            "parameters",
            "cross_entropy",
            "perplexity",
            "perplexity_per_word",
            "bits_per_byte",
            "per_file",
            "pairs",
        }
        assert entry["pairs"][pairs].keys() == {
            "accuracy_over_files",
            "accuracy_over_fields",
            "tie_rate",
            "per_file",
            "per_field",
        }
    assert entries[2]["parameters"] == entries[0]["parameters"] + entries[1]["parameters"]


def test_pairs_alone_need_no_shard(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = str(write_pairs(tmp_path / "pairs", PAIRS))
    evaluate.main([*checkpoints, "--pairs", pairs, "--json", "s.json", "--device", "cpu"])
    entries = json.loads((tmp_path / "s.json").read_text())["checkpoints"]
    assert entries[0]["cross_entropy"] is None and entries[0]["pairs"][pairs]["per_file"]


def test_text_of_another_tokenizer_is_refused(checkpoints, tmp_path, capsys):
    other = train_tokenizer(write_text(2000, seed=1).replace("dog", "fox"))
    write_split(tmp_path, "dev", other, {"text": write_text(500, seed=9)})
    assert run_program(lambda: evaluate.main([*checkpoints, "--data", str(tmp_path)])) == 1
    assert "--tokenizer" in capsys.readouterr().err


def test_pairs_are_scored_although_the_default_text_is_of_another_tokenizer(
    checkpoints, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    other = train_tokenizer(write_text(2000, seed=1).replace("dog", "fox"))
    write_split(tmp_path / "data" / "babylm", "dev", other, {"text": write_text(500, seed=9)})
    pairs = str(write_pairs(tmp_path / "pairs", PAIRS))
    assert run_program(lambda: evaluate.main([*checkpoints, "--pairs", pairs, "--device", "cpu"])) == 0
    assert "minimal pairs only" in capsys.readouterr().err


def test_text_without_spaces_has_no_perplexity_per_word(tokenizer, tmp_path):
    write_split(tmp_path, "dev", tokenizer, {"text": "x" * 3000})
    scores = scores_of(uniform(), TokenShard(tmp_path / "dev.bin"), 32)
    assert scores["perplexity_per_word"] is None and scores["bits_per_byte"] > 1


def test_a_missing_shard_is_named(checkpoints, tmp_path, capsys):
    assert run_program(lambda: evaluate.main([*checkpoints, "--data", str(tmp_path / "none")])) == 1
    assert "tokenize_corpus.py" in capsys.readouterr().err


def test_the_fitted_temperature_is_the_best_there_is(dev_shard):
    """Logits of a model that is too sure of itself become those of one that is not."""
    ids = torch.from_numpy(dev_shard.tokens.astype("int64"))
    counts = torch.bincount(ids[1:], minlength=V).float() + 1
    model = Fixed((3.0 * counts.log()).expand(V, V).clone())
    fitted = fitted_temperature(model, dev_shard, 32)
    losses = {
        t: shard_losses(Scaled(model, t), dev_shard, 32).mean().item()
        for t in (1.0, 0.98 * fitted, fitted, 1.02 * fitted)
    }
    assert min(losses, key=losses.get) == fitted
    assert 2.0 < fitted < 3.1 and losses[fitted] < losses[1.0] - 0.1


def test_losses_are_kept_weighted_and_scaled_from_the_command_line(
    checkpoints, data_folder, tokenizer, tmp_path, capsys
):
    out, kept = tmp_path / "s.json", tmp_path / "l.npz"
    train = str(data_folder / "train.bin")
    arguments = [checkpoints[0], "--data", str(data_folder), "--device", "cpu", "--json", str(out)]
    arguments += ["--weight-by", train, "--temperature-scaled", str(data_folder)]
    assert run_program(lambda: evaluate.main([*arguments, "--losses", str(kept)])) == 0
    (entry,) = json.loads(out.read_text())["checkpoints"]
    losses = read_losses(kept)
    assert mean_loss(losses, losses.nats, "plain") == pytest.approx(entry["cross_entropy"])
    weighted = mean_loss(losses, losses.nats, "train")
    assert weighted == pytest.approx(entry["weighted_cross_entropy"])
    shares = {f.name: f.stop - f.start for f in TokenShard(train).files}
    expected = sum(
        entry["per_file"][name]["cross_entropy"] * share / sum(shares.values())
        for name, share in shares.items()
    )
    assert weighted == pytest.approx(expected)
    scaled = entry["temperature_scaled"]
    assert scaled["cross_entropy"] < entry["cross_entropy"] and scaled["temperature"] != 1
    assert mean_loss(losses, losses.scaled_nats, "plain") == pytest.approx(scaled["cross_entropy"])
    # The temperature is that of the text of its own option, whatever text is scored.
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    write_split(other, "dev", tokenizer, {"a": "zzz qqq " * 40})
    found = []
    for fitted_on in (data_folder, other):
        again = [*arguments[:1], "--data", str(other), *arguments[3:7]]
        assert evaluate.main([*again, "--temperature-scaled", str(fitted_on)]) == 0
        (entry,) = json.loads(out.read_text())["checkpoints"]
        found.append(entry["temperature_scaled"]["temperature"])
    assert found[0] == scaled["temperature"] != found[1]


def test_scores_in_bfloat16_are_near(checkpoints, data_folder, tokenizer, tmp_path):
    pairs = str(write_pairs(tmp_path / "pairs", PAIRS, "one"))
    found = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / f"{precision}.json"
        options = ["--data", str(data_folder), "--pairs", pairs, "--device", "cpu"]
        options += ["--precision", precision, "--json", str(out)]
        assert evaluate.main([checkpoints[0], *options]) == 0
        result = json.loads(out.read_text())
        assert result["precision"] == precision
        found.append(result["checkpoints"][0])
    a, b = (entry["cross_entropy"] for entry in found)
    assert a != b and abs(a - b) < 1e-3 * a
    assert found[0]["pairs"] == found[1]["pairs"]


@pytest.mark.parametrize(
    "options",
    [
        ["--losses", "l.npz", "b.pt"],  # two models
        ["--compare", "a.npz"],
        ["--against", "a.npz"],
        ["--compare", "a.npz", "--against", "b.npz", "--ensemble", "a.pt"],
        ["--surprisals", "a.tsv", "--text", "a.txt", "--json", "a.json"],
    ],
)
def test_options_that_do_not_go_together_exit_with_2(options):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["a.pt", *options])
    assert stop.value.code == 2


def test_shares_of_text_that_has_none_of_the_files_are_refused(
    checkpoints, data_folder, tokenizer, tmp_path, capsys
):
    write_split(tmp_path / "other", "train", tokenizer, {"poems": write_text(500, seed=2)})
    arguments = [checkpoints[0], "--data", str(data_folder), "--device", "cpu"]
    arguments += ["--weight-by", str(tmp_path / "other" / "train.bin")]
    assert run_program(lambda: evaluate.main(arguments)) == 1
    assert "leave out --weight-by" in capsys.readouterr().err


def test_a_run_is_scored_on_its_own_text_where_none_is_named(
    tokenizer, data_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = models.build_model("llama-tiny", V)
    config = {"sequence_length": 32, "data": str(data_folder)}
    save_model(tmp_path / "a.pt", model, tokenizer, "llama-tiny", config=config)
    arguments = ["a.pt", "--device", "cpu", "--json", "s.json"]
    assert run_program(lambda: evaluate.main(arguments)) == 0
    (entry,) = json.loads((tmp_path / "s.json").read_text())["checkpoints"]
    assert entry["per_file"].keys() == {f.name for f in TokenShard(data_folder / "dev.bin").files}
    config["data"] = "gone"
    save_model(tmp_path / "a.pt", model, tokenizer, "llama-tiny", config=config)
    assert run_program(lambda: evaluate.main(arguments)) == 1
    assert "gone/dev.bin, the text of a.pt's run, is not here" in capsys.readouterr().err
    shutil.copytree(data_folder, tmp_path / "data" / "babylm")
    assert run_program(lambda: evaluate.main(arguments)) == 0
    assert "is not here: data/babylm/dev.bin is scored" in capsys.readouterr().err


def test_fields_are_shown_and_2025_counts_one_more(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_pairs(tmp_path / "pairs", [p | {"linguistics_term": "s-selection"} for p in PAIRS[:1]])
    for convention, field in (("newline", "argument_structure"), ("2025", "s-selection")):
        arguments = [checkpoints[0], "--pairs", str(folder), "--device", "cpu"]
        assert run_program(lambda a=arguments, c=convention: evaluate.main([*a, "--convention", c])) == 0
        assert f"\n{field} " in capsys.readouterr().out
