"""Scores follow their definitions: on a uniform model, on hand-made pairs, file by file."""

import hashlib
import itertools
import json
import math
import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import model as models
from conftest import make_tokenizer, save_model, train_tokenizer, write_split, write_text
from data import TokenShard
from evaluation import perplexity, scoring
from evaluation.minimal_pairs import (
    accuracies,
    pair_scores,
    pairs_digest,
    read_pairs,
    sentence_scores,
    write_predictions,
)
from evaluation.perplexity import corpus_scores, fitted_temperature, shard_losses
from evaluation.scoring import CONVENTIONS, Ensemble
from evaluation.statistics import mean_loss, read_losses
from tokenizer import BOS, EOS
from training.io import UserError, run_program, sha256

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
    return corpus_scores(shard, *shard_losses(model, shard, sequence_length))


def run(*arguments):
    """The exit code of evaluate.py on the CPU."""
    return run_program(lambda: evaluate.main([*map(str, arguments), "--device", "cpu"]))


@pytest.fixture
def dev_shard(data_folder):
    return TokenShard(data_folder / "dev.bin")


# ---- text


def test_a_uniform_models_perplexity_is_the_vocabulary_size(dev_shard):
    scores = scores_of(uniform(), dev_shard, 32)
    targets = len(dev_shard.tokens) - 1
    assert scores["perplexity"] == pytest.approx(V, rel=1e-5)
    assert scores["cross_entropy"] == pytest.approx(math.log(V), rel=1e-6)
    per_word = math.exp(targets * math.log(V) / dev_shard.words)
    assert scores["perplexity_per_word"] == pytest.approx(per_word, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(targets * math.log2(V) / dev_shard.bytes, rel=1e-5)


@pytest.mark.parametrize("sequence_length", [7, 32, 10_000])
def test_every_token_but_the_first_is_scored_once(dev_shard, sequence_length):
    """A model without memory gives the same total for every chunking."""
    torch.manual_seed(0)
    model = Fixed(torch.randn(V, V))
    scores = scores_of(model, dev_shard, sequence_length)
    ids = torch.from_numpy(dev_shard.tokens.astype("int64"))
    losses = nn.functional.cross_entropy(model.logits[ids[:-1]], ids[1:], reduction="none")
    assert scores["cross_entropy"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for file in dev_shard.files:
        expected = losses[max(file.start - 1, 0) : file.stop - 1].mean().item()
        assert scores["per_file"][file.name]["cross_entropy"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", ["x" * 3000, "小猫喜欢苹果老师看见红书那个大苹果。\n" * 50])
def test_text_without_spaces_has_no_perplexity_per_word(tokenizer, tmp_path, text):
    write_split(tmp_path, "dev", tokenizer, {"text": text})
    scores = scores_of(uniform(), TokenShard(tmp_path / "dev.bin"), 32)
    assert scores["perplexity_per_word"] is None and scores["bits_per_byte"] > 1


def test_the_fitted_temperature_is_the_best_there_is(dev_shard, monkeypatch):
    """Logits that are too confident by a factor of three are divided by nearly three."""
    ids = torch.from_numpy(dev_shard.tokens.astype("int64"))
    counts = torch.bincount(ids[1:], minlength=V).float() + 1
    model = Fixed((3.0 * counts.log()).expand(V, V).clone())
    fitted = fitted_temperature(model, dev_shard, 32)
    taus = (1.0, 0.98 * fitted, fitted, 1.02 * fitted)
    losses = dict(zip(taus, shard_losses(model, dev_shard, 32, taus).mean(1).tolist()))
    assert min(losses, key=losses.get) == fitted
    assert 2.0 < fitted < 3.1 and losses[fitted] < losses[1.0] - 0.1

    read = TokenShard.chunks
    # A sample of the chunks, from all of the text, finds nearly the same.
    chunks = []
    monkeypatch.setattr(perplexity, "FITTED_CHUNKS", 20)
    monkeypatch.setattr(
        TokenShard,
        "chunks",
        lambda shard, starts, *args: (chunks.append([*starts]), read(shard, starts, *args))[1],
    )
    assert abs(fitted_temperature(model, dev_shard, 32) / fitted - 1) < 0.05
    last = max(map(max, chunks))
    assert len(set().union(*chunks)) <= 21 and last > 0.9 * dev_shard.num_tokens


def test_the_ensemble_averages_logits_and_leaves_out_rows_that_pad_a_vocabulary():
    """Hugging Face's resize_token_embeddings(pad_to_multiple_of=64) adds such rows."""
    tokens = torch.randint(V, (2, 6))
    torch.manual_seed(0)
    gpt2, llama, padded = (
        models.build_model(name, size).eval()
        for name, size in (("gpt2-tiny", V), ("llama-tiny", V), ("gpt2-tiny", 320))
    )
    torch.testing.assert_close(Ensemble([gpt2, llama])(tokens), (gpt2(tokens) + llama(tokens)) / 2)
    padded.load_state_dict(
        {
            name: torch.cat([tensor, torch.randn(20, tensor.shape[1])]) if len(tensor) == V else tensor
            for name, tensor in gpt2.state_dict().items()
        }
    )
    torch.testing.assert_close(Ensemble([padded, gpt2])(tokens), gpt2(tokens))


# ---- minimal pairs

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
    assert scores["tie_rate"] == pytest.approx(1 / 3)
    ties = {"f": pairs["hand_made"][2:]}
    scores = accuracies(ties, pair_scores(uniform(), tokenizer, ties))
    assert (scores["accuracy_over_files"], scores["tie_rate"]) == (0.5, 1.0)


def test_predictions_name_the_group_and_a_tie_is_the_acceptable_sentence(tokenizer, tmp_path):
    """The group is the file, or `UID` where there is a `field`, as in BLiMP's own files."""
    write_pairs(tmp_path / "blimp", [PAIRS[1] | {"field": "syntax", "UID": "principle_A"}, PAIRS[2]])
    pairs = {str(tmp_path / "blimp"): read_pairs(tmp_path / "blimp")}
    scores = [pair_scores(prefers(tokenizer, "cat"), tokenizer, files) for files in pairs.values()]
    write_predictions(tmp_path / "main", pairs, scores)
    path = tmp_path / "main" / "zero_shot" / "causal" / "blimp" / "blimp" / "predictions.json"
    assert json.loads(path.read_text()) == {
        "principle_A": {"predictions": [{"id": "principle_A_0", "pred": "a cat"}]},
        "hand_made": {"predictions": [{"id": "hand_made_0", "pred": "a dog"}]},
    }
    write_pairs(tmp_path / "blimp", [{"Context1": "a", "Target1": "b", "Target2": "c", "Domain": "d"}], "e")
    pairs = {str(tmp_path / "blimp"): read_pairs(tmp_path / "blimp")}
    with pytest.raises(UserError, match="has two tasks"):
        write_predictions(tmp_path / "main", pairs, [torch.zeros(3, 2)])


def test_pairs_without_contexts_have_the_digest_that_earlier_results_name(tmp_path):
    pairs = read_pairs(write_pairs(tmp_path / "p", PAIRS), "2025")
    triples = {"hand_made": [[*pair.values()] for pair in PAIRS]}
    assert pairs_digest(pairs) == sha256(json.dumps(triples).encode())


def test_accuracies_are_means_over_files_and_over_fields(tokenizer, tmp_path):
    folder = write_pairs(tmp_path / "p", PAIRS[:1], "one")
    pairs = read_pairs(write_pairs(folder, PAIRS[1:2] * 3, "two"))
    scores = accuracies(pairs, pair_scores(prefers(tokenizer, "cat"), tokenizer, pairs))
    assert scores["per_file"] == {"one": 1.0, "two": 0.0} and scores["accuracy_over_files"] == 0.5
    assert scores["accuracy_over_fields"] == 0.25  # one field of four pairs


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
        b'{"sentence_good": "a", "sentence_bad": "b"}',  # no field, unlike the others
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    folder = write_pairs(tmp_path / "p", PAIRS)
    with open(folder / "hand_made.jsonl", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"hand_made\.jsonl, line 4"):
        read_pairs(folder)


def test_what_cannot_be_read_in_a_folder_of_pairs_is_an_error_or_named(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no \*\.jsonl"):
        read_pairs(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        read_pairs(tmp_path / "none")
    folder = write_pairs(tmp_path, PAIRS)
    (folder / "more.jsonl.gz").write_bytes(b"")
    assert [*read_pairs(folder)] == ["hand_made"]
    assert "more.jsonl.gz" in capsys.readouterr().err
    (folder / "link.jsonl").symlink_to("nothing")
    with pytest.raises(UserError, match=r"link\.jsonl is no file"):
        read_pairs(folder)


def test_sentences_are_scored_after_a_newline_whatever_their_neighbours(tokenizer):
    torch.manual_seed(0)
    model = models.build_model("llama-tiny", V).eval()
    sentences = ["the cat runs", "a", "the old dog sees the small garden", "the cat runs", "and"]
    for sentence, score in zip(sentences, sentence_scores(model, tokenizer, sentences)):
        ids = torch.tensor([tokenizer.encode("\n") + tokenizer.encode(sentence)])
        log_p = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).sum()
        torch.testing.assert_close(score.float(), log_p, rtol=1e-5, atol=1e-4)


def test_conventions_differ_in_the_prefix_of_a_sentence(tokenizer):
    """A table of log-probabilities by the last token alone shows which tokens were predicted."""
    torch.manual_seed(0)
    model = Fixed(torch.randn(V, V))
    log_p, ids = model.logits.detach().log_softmax(-1), tokenizer.encode("the cat")
    chains = {
        "newline": [*tokenizer.encode("\n"), *ids],
        "2023": [EOS, *ids],
        "2024": [BOS, *tokenizer.encode(" the cat")],
        "2025": ids,
        "bos": [BOS, *ids],
    }
    assert chains.keys() == CONVENTIONS.keys()
    for convention, chain in chains.items():
        (score,) = sentence_scores(model, tokenizer, ["the cat"], convention)
        expected = sum(log_p[a, b] for a, b in itertools.pairwise(chain))
        assert math.isclose(score, expected, rel_tol=1e-5), convention


def test_special_tokens_have_the_ids_of_the_tokenizer_and_what_it_lacks_is_refused(tmp_path, capsys):
    """T5's numbering: pad 0, eos 1, unk 2, no bos; SentencePiece's default rules drop newlines."""
    tokenizer = make_tokenizer(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    model = Fixed(torch.randn(tokenizer.vocabulary_size, tokenizer.vocabulary_size))
    log_p, ids = model.logits.detach().log_softmax(-1), tokenizer.encode("the cat")
    (score,) = sentence_scores(model, tokenizer, ["the cat"], "2023")
    expected = sum(log_p[a, b] for a, b in itertools.pairwise([1, *ids]))
    assert math.isclose(score, expected, rel_tol=1e-5)
    for convention in ("newline", "2024", "bos"):
        with pytest.raises(UserError, match=f"--convention {convention}: the tokenizer has no"):
            sentence_scores(model, tokenizer, ["the cat"], convention)
    with pytest.raises(UserError, match="drops a leading space"):
        no_prefix = make_tokenizer(add_dummy_prefix=False)
        sentence_scores(model, no_prefix, ["the cat"], "2024")
    llama = models.build_model("llama-tiny", tokenizer.vocabulary_size)
    save_model(tmp_path / "a.pt", llama, tokenizer, "llama-tiny")
    pairs = write_pairs(tmp_path / "pairs", PAIRS)
    for convention, code in (("newline", 0), ("bos", 1)):
        options = ["--pairs", pairs, "--convention", convention, "--json", tmp_path / "s.json"]
        assert run(tmp_path / "a.pt", *options) == code
    assert json.loads((tmp_path / "s.json").read_text())["convention"] == "2023"
    assert "the tokenizer drops newlines" in capsys.readouterr().err


def test_a_single_token_without_context_is_no_evidence_and_a_text_beyond_the_context_refused(tokenizer):
    assert len(tokenizer.encode("a")) == 1
    assert sentence_scores(uniform(), tokenizer, ["a"], "2025").tolist() == [0.0]
    with pytest.raises(UserError, match="longer than the model's context"):
        sentence_scores(uniform(), tokenizer, ["the cat " * 100])


# ---- the program


@pytest.fixture
def checkpoints(tokenizer, tmp_path):
    for name in ("gpt2-tiny", "llama-tiny"):
        torch.manual_seed(0)
        save_model(tmp_path / f"{name}.pt", models.build_model(name, V), tokenizer, name, length=32)
    return [tmp_path / "gpt2-tiny.pt", tmp_path / "llama-tiny.pt"]


@pytest.fixture
def other_data(tmp_path):
    """A data folder of another tokenizer."""
    other = train_tokenizer(write_text(2000, seed=1).replace("dog", "fox"))
    write_split(tmp_path / "other", "dev", other, {"text": write_text(500, seed=9)})
    return tmp_path / "other"


def results_in(path):
    return json.loads(path.read_text())["checkpoints"]


def test_several_checkpoints_and_their_ensemble_side_by_side(checkpoints, data_folder, tmp_path, capsys):
    pairs, out = write_pairs(tmp_path / "pairs", PAIRS), tmp_path / "s.json"
    options = ["--data", data_folder, "--pairs", pairs, "--json", out]
    assert run(*checkpoints, "--ensemble", *checkpoints, *options) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("gpt2-tiny", "llama-tiny", "ensemble"))
    results = results_in(out)
    text = "cross_entropy bits_per_byte perplexity perplexity_per_word per_file".split()
    means = "accuracy_over_files accuracy_over_fields tie_rate per_file per_field".split()
    for result in results:
        assert [*result] == ["path", "digest", "model", "parameters", *text, "pairs"]
        assert [*result["pairs"][str(pairs)]] == means
    assert results[2]["parameters"] == results[0]["parameters"] + results[1]["parameters"]


def test_text_that_is_missing_or_of_another_tokenizer_is_refused_and_left_out_where_pairs_are_scored(
    checkpoints, other_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pairs = write_pairs(tmp_path / "pairs", PAIRS)
    for missing in (True, False):
        assert run(*checkpoints, "--pairs", pairs, "--json", "s.json") == 0
        assert "only minimal pairs are scored" in capsys.readouterr().err
        result = results_in(tmp_path / "s.json")[0]
        assert result["cross_entropy"] is None and result["pairs"][str(pairs)]["per_file"]
        if missing:
            shutil.copytree(other_data, tmp_path / "data" / "babylm")
    assert run(*checkpoints, "--data", other_data) == 1
    assert "--tokenizer" in capsys.readouterr().err


def test_json_and_losses_say_from_what_the_numbers_were_made(checkpoints, data_folder, tmp_path):
    """Digests change with the pairs' content, under the same folder name, and with nothing else."""
    pairs, digests = write_pairs(tmp_path / "pairs", PAIRS), []
    for good in ("a cat", "a cat", "the cat"):
        write_pairs(tmp_path / "pairs", [PAIRS[0] | {"sentence_good": good}, *PAIRS[1:]])
        options = ["--pairs", pairs, "--losses", tmp_path / "l.npz", "--json", tmp_path / "s.json"]
        assert run(checkpoints[0], "--data", data_folder, *options) == 0
        digests.append(json.loads((tmp_path / "s.json").read_text())["digests"])
    assert digests[0] == digests[1]
    assert digests[0]["pairs"][str(pairs)] != digests[2]["pairs"][str(pairs)]
    assert digests[0]["text"] == digests[2]["text"] == TokenShard(data_folder / "dev.bin").digest
    assert digests[2]["losses"] == hashlib.sha256((tmp_path / "l.npz").read_bytes()).hexdigest()
    assert read_losses(tmp_path / "l.npz").precision == "fp32"


@pytest.mark.parametrize("option", ["--json", "--losses", "--pair-scores", "--surprisals"])
def test_files_that_cannot_be_written_are_refused_before_anything_is_read(option, tmp_path, capsys):
    more = {"--pair-scores": ["--pairs", "p"], "--surprisals": ["--text", "t"]}.get(option, [])
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "cannot be written")):
        assert run("missing.pt", option, path, *more) == 1
        assert f"{option} {path}" in (message := capsys.readouterr().err) and reason in message
    assert run("a.pt", option, "a.pt", *more) == 1
    assert "another option" in capsys.readouterr().err


def test_a_run_is_scored_on_its_own_text_by_default(tokenizer, data_folder, tmp_path, capsys):
    model, out = models.build_model("llama-tiny", V), tmp_path / "s.json"
    for data, code in ((str(data_folder), 0), ("gone", 1)):
        config = {"sequence_length": 32, "data": data}
        save_model(tmp_path / "a.pt", model, tokenizer, "llama-tiny", config=config)
        assert run(tmp_path / "a.pt", "--json", out) == code
    (result,) = results_in(out)
    assert result["per_file"].keys() == {f.name for f in TokenShard(data_folder / "dev.bin").files}
    message = capsys.readouterr().err
    assert "gone/dev.bin does not exist" in message and "--data DIR" in message


def test_losses_are_weighted_and_scaled_from_the_command_line(checkpoints, data_folder, tokenizer, tmp_path):
    out, train = tmp_path / "s.json", data_folder / "train.bin"
    options = ["--weight-by", train, "--temperature-scaled", data_folder, "--losses", tmp_path / "l.npz"]
    assert run(checkpoints[0], "--data", data_folder, "--json", out, *options) == 0
    (result,) = results_in(out)
    losses = read_losses(tmp_path / "l.npz")
    assert mean_loss(losses, losses.nats, "plain") == pytest.approx(result["cross_entropy"])
    weighted = mean_loss(losses, losses.nats, "train")
    assert weighted == pytest.approx(result["weighted_cross_entropy"])
    tokens = {f.name: f.stop - f.start for f in TokenShard(train).files}
    sums = (result["per_file"][name]["cross_entropy"] * count for name, count in tokens.items())
    assert weighted == pytest.approx(sum(sums) / sum(tokens.values()))
    scaled = result["temperature_scaled"]
    assert scaled["cross_entropy"] < result["cross_entropy"] and scaled["temperature"] != 1
    assert mean_loss(losses, losses.scaled_nats, "plain") == pytest.approx(scaled["cross_entropy"])


def test_the_temperature_is_that_of_the_text_of_its_own_option(checkpoints, data_folder, tokenizer, tmp_path):
    write_split(tmp_path / "other", "dev", tokenizer, {"a": "zzz qqq " * 40})
    temperatures = {}
    for scored, fitted in itertools.product((data_folder, tmp_path / "other"), repeat=2):
        options = ["--data", scored, "--temperature-scaled", fitted, "--json", tmp_path / "s.json"]
        assert run(checkpoints[0], *options) == 0
        (result,) = results_in(tmp_path / "s.json")
        temperatures.setdefault(fitted, set()).add(result["temperature_scaled"]["temperature"])
    assert [len(values) for values in temperatures.values()] == [1, 1]
    assert len(set.union(*temperatures.values())) == 2


def test_scores_in_bfloat16_are_near(checkpoints, data_folder, tmp_path):
    pairs, results = write_pairs(tmp_path / "pairs", PAIRS, "one"), []
    for precision in ("fp32", "bf16"):
        out = tmp_path / f"{precision}.json"
        options = ["--data", data_folder, "--pairs", pairs, "--precision", precision]
        assert run(checkpoints[0], *options, "--json", out) == 0
        assert json.loads(out.read_text())["precision"] == precision
        results += results_in(out)
    a, b = (result["cross_entropy"] for result in results)
    assert a != b and abs(a - b) < 1e-3 * a
    assert results[0]["pairs"] == results[1]["pairs"]


class Operators(TorchDispatchMode):
    """Keeps the names of all operators that run in this context."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
def test_products_by_one_dnn_give_the_same_losses(preset, monkeypatch):
    model, losses, names = models.build_model(preset, 300).eval(), {}, {}
    tokens = torch.randint(300, (5, 33), generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which are 0 in a new model
            nn.init.normal_(parameter, std=0.1)
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        with Operators() as operators:
            losses[capability] = scoring.token_losses(model, tokens[:, :-1], tokens[:, 1:])
        names[capability] = operators.names
    torch.testing.assert_close(losses["AVX512"], losses["AVX2"], rtol=0, atol=1e-5)
    if torch.backends.mkldnn.is_available():
        assert "mkldnn::_linear_pointwise" in names["AVX512"] - names["AVX2"]
        assert not names["AVX512"] & {"aten::mm", "aten::addmm"}


def test_one_dnn_leaves_other_precisions_alone():
    layer, x = nn.Linear(40, 30), torch.randn(7, 40)
    for dtype in (torch.bfloat16, torch.float64):
        double = dtype == torch.float64
        layer, x = (layer.double(), x.double()) if double else (layer, x)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=not double):
            expected = layer(x)
            with scoring.OneDnnProducts():
                assert layer(x).dtype == dtype and torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        ["--losses", "l.npz", "b.pt"],  # two models
        ["--compare", "a.npz"],
        ["--against", "a.npz"],
        ["--compare", "a.npz", "--against", "b.npz", "--ensemble", "a.pt"],
        ["--surprisals", "a.tsv"],
        ["--surprisals", "a.tsv", "--text", "a.txt", "b.pt"],
        ["--surprisals", "a.tsv", "--text", "a.txt", "--json", "a.json"],
        ["--pair-scores", "a.npz"],
        ["--teacher-weights", "1"],
        ["--predictions", "main", "--convention", "2025"],  # without pairs
        ["--predictions", "main", "--pairs", "p"],
        ["--predictions", "main", "--pairs", "p", "--convention", "2025", "b.pt"],  # two models
    ],
)
def test_options_that_do_not_go_together_exit_with_2(options):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["a.pt", *options])
    assert stop.value.code == 2


def test_weights_come_from_training_text_of_the_same_tokenizer_and_sub_corpora(
    checkpoints, data_folder, other_data, tokenizer, tmp_path, capsys
):
    write_split(tmp_path / "poems", "train", tokenizer, {"poems": write_text(500, seed=2)})
    (other_data / "dev.bin").rename(other_data / "train.bin")
    refused = {
        tmp_path / "poems" / "train.bin": "leave out --weight-by",
        other_data / "train.bin": "another tokenizer",
        data_folder / "dev.bin": "is dev text",
        tmp_path / "pairs": "pairs/train.bin does not exist",
    }
    (tmp_path / "pairs").mkdir()
    for path, reason in refused.items():
        assert run(checkpoints[0], "--data", data_folder, "--weight-by", path) == 1
        assert reason in capsys.readouterr().err
    assert run(checkpoints[0], "--data", data_folder, "--weight-by", data_folder) == 0


def test_fields_are_shown_and_2025_counts_one_more(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = write_pairs(tmp_path / "pairs", PAIRS[:1])
    for convention, field in (("newline", "argument_structure"), ("2025", "s-selection")):
        assert run(checkpoints[0], "--pairs", pairs, "--convention", convention) == 0
        assert f"\n{field} " in capsys.readouterr().out
