"""What is exported loads with stock classes and scores the same; what comes back is the same."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers

import distill
import evaluate
import export_hf
import model as models
from benchmarks.reference import hugging_face_model
from conftest import save_model, train_tokenizer, write_text
from distill import DistillConfig
from tokenizer import BOS, EOS, Tokenizer
from training.checkpoint import read_checkpoint
from training.io import run_program
from training.options import may_change

V = 300
NASTY = [
    "the old dog",
    " leading",
    "trailing ",
    "two  blanks   three",
    "\ttab\tand\nline\r\nend",
    "\n\n\n",
    " ",
    "",
    "naïve café e\u0301",
    "emoji 👩‍👩‍👧 🇫🇷",
    "\u2028 and \u2029 and \u0085",
    "nul\x00byte",
    "\u00a0no-break\u200b",
    "ﬁ ½ ①",
    "مرحبا بالعالم",
    "日本語",
    "x" * 3000,
    "dog" * 500,
    "<0x0A> and ▂",
    "\ufeffbom",
    'don\'t -- "stop"...',
    "1234567890",
]


@pytest.fixture(params=["gpt2-tiny", "llama-tiny"])
def checkpoint(request, tmp_path, tokenizer):
    torch.manual_seed(0)
    model = models.build_model(request.param, V)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save_model(
        tmp_path / "a.pt",
        model,
        tokenizer,
        request.param,
        config={"sequence_length": 32, "learning_rate": 0.003, "train_shard": "ab" * 32},
        progress={"step": 7, "steps": 9, "words": 1234, "dev_cross_entropy": 4.5},
        teachers=[{"name": "gpt2-tiny", "digest": "0123456789abcdef"}],
        commit="abc123",
    )
    return tmp_path / "a.pt"


def export(checkpoint, *options, out="exported"):
    out = checkpoint.parent / out
    assert run_program(lambda: export_hf.main([str(checkpoint), "--out", str(out), *options])) == 0
    return out


def import_back(folder, out):
    return run_program(lambda: export_hf.main(["--import", str(folder), "--out", str(out)]))


def test_stock_classes_load_the_folder_and_compute_the_same(checkpoint):
    folder = export(checkpoint)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(theirs).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel")
    ours, _ = models.load_checkpoint(checkpoint)
    tokens = torch.randint(V, (2, 40))
    with torch.no_grad():
        a, b = ours(tokens), theirs.eval()(tokens).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert theirs.config.hidden_size == ours.config.hidden_size
    ids = (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id)
    assert ids == (1, 2, 0)


def test_the_exported_tokenizer_gives_our_ids(checkpoint, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(export(checkpoint))
    assert theirs.is_fast and len(theirs) == V
    for text in [*NASTY, *write_text(3000, seed=7).split("\n")]:
        encoded = theirs(text, return_offsets_mapping=True)
        assert set(encoded) == {"input_ids", "attention_mask", "offset_mapping"}
        assert encoded["input_ids"] == tokenizer.encode(text), text
        assert theirs.decode(encoded["input_ids"]) == text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<pad>")
    assert theirs.padding_side == "right" and theirs.model_max_length == 256


def test_a_tokenizer_with_long_merges_is_the_same_too(checkpoint):
    """A tokenizer with a larger vocabulary, whose pieces can be split in several ways."""
    text = write_text(4000, seed=11) + "banana bandana cabana anagram aaaa aaaaaaa abab " * 50
    tokenizer = train_tokenizer(text, 400)
    theirs = tokenizers_of(tokenizer)
    for line in [*text.split("\n"), "bananananabandananana", "aaaaaaaaaaaaaaa", *NASTY]:
        assert theirs.encode(line).ids == tokenizer.encode(line), line


def tokenizers_of(tokenizer):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(export_hf.hf_tokenizer(tokenizer)))


def test_two_texts_as_a_pair_are_parted_by_a_newline(checkpoint, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(export(checkpoint))
    ids = theirs("She came. Yet", "the dog ran.")["input_ids"]
    assert ids == tokenizer.encode("She came. Yet\nthe dog ran.")


def test_a_llama_can_be_given_longer_texts_and_a_gpt2_cannot(checkpoint, capsys):
    out = checkpoint.parent / "long"
    arguments = [str(checkpoint), "--out", str(out), "--positions", "512"]
    code = run_program(lambda: export_hf.main(arguments))
    if models.load_checkpoint(checkpoint)[1]["model"]["architecture"] == "gpt2":
        assert code == 1 and "only a LLaMA can have more" in capsys.readouterr().err
        return
    card = (out / "README.md").read_text()
    assert code == 0 and "--sequence_length 512" in card and "Beyond 256 positions nothing" in card
    capsys.readouterr()
    fewer = [str(checkpoint), "--out", str(out) + "2", "--positions", "64"]
    assert run_program(lambda: export_hf.main(fewer)) == 1
    assert "give at least that many" in capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.config.max_position_embeddings == tokenizer.model_max_length == 512
    ours, _ = models.load_checkpoint(checkpoint)
    tokens = torch.randint(V, (1, 200))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)
    assert theirs(torch.randint(V, (1, 512))).logits.isfinite().all()


def test_several_checkpoints_become_a_folder_each(checkpoint, capsys):
    marks = [checkpoint.parent / f"chck_{n}M.pt" for n in (1, 2)]
    for mark in marks:
        mark.write_bytes(checkpoint.read_bytes())
    out = checkpoint.parent / "marks"
    paths = [str(mark) for mark in marks]
    assert run_program(lambda: export_hf.main([*paths, "--out", str(out)])) == 0
    assert sorted(p.name for p in out.iterdir()) == ["chck_1M", "chck_2M"]
    assert (out / "chck_2M" / "config.json").exists()
    with pytest.raises(SystemExit):
        export_hf.main([paths[0], paths[0], "--out", str(out / "x")])
    marks[1].write_bytes(b"damaged")
    assert run_program(lambda: export_hf.main([*paths, "--out", str(out / "x")])) == 1
    assert not (out / "x").exists()


def test_the_card_names_a_licence_and_languages_only_where_they_are_given(checkpoint):
    from huggingface_hub import ModelCard

    data = ModelCard.load(export(checkpoint) / "README.md").data
    assert data.license is data.language is data.base_model is None
    given = ["--license", "apache-2.0", "--language", "nl", "fy", "--base-model", "someone/base"]
    data = ModelCard.load(export(checkpoint, *given, out="given") / "README.md").data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["nl", "fy"], "someone/base")


def test_the_card_states_what_the_checkpoint_knows(checkpoint):
    card = (export(checkpoint) / "README.md").read_text(encoding="utf-8")
    for fact in (
        "words seen | 1,234",
        "4.5000",
        "abc123",
        "learning rate | 0.003",
        "gpt2-tiny",
        "300 pieces",
    ):
        assert fact in card, fact
    assert "as initialised" in card and "300 pieces" in card and "dropout | 0." in card


def test_the_card_has_every_option_that_makes_the_model_what_it_is():
    """An option of training is in the card's recipe, or says only where and how fast it is trained."""
    elsewhere = may_change(DistillConfig) - {"dropout", "patience", "init"}
    elsewhere |= {"model", "shape", "objective", "eval_every", "eval_sequences"}
    assert {field.name for field in dataclasses.fields(DistillConfig)} - elsewhere <= set(export_hf.RECIPE)


def test_the_card_has_the_scores_of_its_own_checkpoint(checkpoint, tmp_path, capsys):
    pairs = {"blimp": {"accuracy_over_files": 0.625}}
    digest = read_checkpoint(checkpoint)["digest"]
    entry = {
        "path": str(checkpoint),
        "digest": digest,
        "cross_entropy": 4.25,
        "bits_per_byte": None,
        "pairs": pairs,
    }
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"checkpoints": [entry | {"digest": "another"}, entry]}))
    card = (export(checkpoint, "--scores", str(scores)) / "README.md").read_text()
    assert "| cross entropy | 4.2500 |" in card and "| minimal pairs of blimp | 62.5 % |" in card
    scores.write_text(json.dumps({"checkpoints": [entry | {"digest": "another"}]}))
    arguments = [str(checkpoint), "--out", str(tmp_path / "x"), "--scores", str(scores)]
    assert run_program(lambda: export_hf.main(arguments)) == 1
    assert "no scores of" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_cards_example_runs(checkpoint, tmp_path, monkeypatch, capsys):
    folder = export(checkpoint)
    example = (folder / "README.md").read_text().split("```")[1].removeprefix("python")
    monkeypatch.chdir(folder.parent)
    exec(example, {})
    assert "Once" in capsys.readouterr().out


def test_without_the_packages_of_the_extra_one_line_says_what_to_install(checkpoint, monkeypatch, capsys):
    folder = export(checkpoint)
    out = str(checkpoint.parent / "out")
    for package, arguments in (
        ("tokenizers", [str(checkpoint)]),
        ("safetensors.torch", [str(checkpoint)]),
        ("safetensors.torch", ["--import", str(folder)]),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            assert run_program(lambda a=arguments: export_hf.main([*a, "--out", out])) == 1
        assert "pip install safetensors tokenizers" in capsys.readouterr().err
    assert not Path(out).exists()


def test_the_card_of_what_was_imported_claims_no_training(checkpoint, tmp_path):
    assert import_back(export(checkpoint), tmp_path / "back.pt") == 0
    arguments = [str(tmp_path / "back.pt"), "--out", str(tmp_path / "again")]
    assert run_program(lambda: export_hf.main(arguments)) == 0
    assert "never occurred" not in (tmp_path / "again" / "README.md").read_text()


def test_a_start_token_can_take_the_newlines_place(tmp_path, checkpoint, tokenizer, capsys):
    ours, saved = models.load_checkpoint(checkpoint)
    if saved["model"]["architecture"] == "gpt2":
        arguments = [str(checkpoint), "--out", str(tmp_path / "no"), "--start-token", "newline"]
        assert run_program(lambda: export_hf.main(arguments)) == 1
        assert "--start-token" in capsys.readouterr().err and not (tmp_path / "no").exists()
        return
    folder = export(checkpoint, "--start-token", "newline")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    after_newline = torch.tensor([tokenizer.encode("\nthe cat")])
    with torch.no_grad():
        expected = ours(after_newline)
        for special in (BOS, EOS):
            tokens = after_newline.clone()
            tokens[0, 0] = special
            torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-4)
    assert "copies of the newline's" in (folder / "README.md").read_text()


def test_an_exported_checkpoint_comes_back_unchanged(checkpoint, tmp_path):
    assert import_back(export(checkpoint), tmp_path / "back.pt") == 0
    before, after = (read_checkpoint(p) for p in (checkpoint, tmp_path / "back.pt"))
    assert before["model"]["shape"] == after["model"]["shape"]
    assert before["tokenizer"]["identity"] == after["tokenizer"]["identity"]
    assert before["weights"].keys() == after["weights"].keys()
    for name, weight in before["weights"].items():
        assert torch.equal(weight, after["weights"][name])


def test_a_folder_with_the_tokenizer_of_another_model_is_refused(checkpoint, tmp_path, capsys):
    other = train_tokenizer(write_text(2000, seed=8))
    folder = export(checkpoint)
    (folder / "tokenizer.model").write_bytes(other.model_bytes)
    assert import_back(folder, tmp_path / "back.pt") == 1
    assert "have different pieces" in capsys.readouterr().err
    (folder / "tokenizer.json").write_text("{")
    assert import_back(folder, tmp_path / "back.pt") == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_transformers_wrote_is_read(checkpoint, tmp_path, tokenizer, dtype):
    ours, _ = models.load_checkpoint(checkpoint)
    twin = hugging_face_model(ours, weights=False).to(dtype)
    twin.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    assert import_back(tmp_path / "theirs", tmp_path / "back.pt") == 0
    back, _ = models.load_checkpoint(tmp_path / "back.pt")
    twin = type(twin).from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    tokens = torch.randint(V, (2, 30))
    with torch.no_grad():
        a, b = back(tokens), twin(tokens).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_what_was_imported_can_teach_and_be_trained_further(checkpoint, tmp_path, data_folder):
    assert import_back(export(checkpoint), tmp_path / "back.pt") == 0
    arguments = ["--teachers", str(tmp_path / "back.pt"), "--model", "llama-tiny-student"]
    arguments += ["--init", str(tmp_path / "back.pt"), "--data", str(data_folder)]
    arguments += ["--out", str(tmp_path / "run"), "--steps", "1", "--learning-rate", "0"]
    arguments += ["--batch-size", "4", "--sequence-length", "32", "--device", "cpu"]
    assert run_program(lambda: distill.main(arguments)) == 0
    before = read_checkpoint(tmp_path / "back.pt")["weights"]
    after = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    card = (export(tmp_path / "run" / "best.pt") / "README.md").read_text()
    for fact in ("cleaning | none", "initialised from", "alpha | 0.5", "clip | 1.0", "teachers | exported"):
        assert fact in card, fact
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    if "dropout" not in read_checkpoint(tmp_path / "back.pt")["model"]["shape"]:
        assert abs(json.loads(log[1])["kl"]) < 1e-3  # it is its own teacher


# ---- minimal pairs, through transformers alone


def their_score(model, tokenizer, sentence, convention):
    """log p of a sentence from logits, shift and sum, as the official pipelines do it."""
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    prefix = {"2023": eos, "2024": bos, "2025": [], "bos": bos}
    text = " " + sentence if convention == "2024" else sentence
    context = prefix.get(convention, tokenizer("\n")["input_ids"])
    ids = torch.tensor([context + tokenizer(text)["input_ids"]])
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
    return log_p.gather(2, ids[:, 1:, None]).sum().item()


@pytest.mark.parametrize("convention", evaluate.CONVENTIONS)
def test_pairs_are_scored_as_the_official_pipelines_do(checkpoint, tmp_path, convention):
    folder = tmp_path / "pairs"
    folder.mkdir()
    words = write_text(400, seed=5).split()
    pairs = [
        {
            "sentence_good": " ".join(words[i : i + 4]),
            "sentence_bad": " ".join(words[i + 3 : i + 8]),
            "linguistics_term": "binding" if i % 3 else "ellipsis",
        }
        for i in range(0, 200, 8)
    ]
    for name, part in (("first", pairs[:9]), ("second", pairs[9:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in part))
    arguments = [str(checkpoint), "--pairs", str(folder), "--convention", convention, "--device"]
    arguments += [
        "cpu",
        "--pair-scores",
        str(tmp_path / "s.npz"),
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert run_program(lambda: evaluate.main(arguments)) == 0
    saved = np.load(tmp_path / "s.npz")
    assert saved["good"].shape == (1, len(pairs)) and [*saved["checkpoint"]] == [str(checkpoint)]

    exported = export(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    sides = ("sentence_good", "sentence_bad")
    theirs = np.array([[their_score(model, tokenizer, pair[k], convention) for k in sides] for pair in pairs])
    ours = np.stack([saved["good"][0], saved["bad"][0]], axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    right = theirs[:, 0] > theirs[:, 1]
    entry = json.loads((tmp_path / "s.json").read_text())["checkpoints"][0]["pairs"][str(folder)]
    for name in ("first", "second"):
        assert entry["per_file"][name] == right[saved["paradigm"] == name].mean()
    per_file = [right[saved["paradigm"] == name].mean() for name in ("first", "second")]
    per_field = [right[saved["field"] == field].mean() for field in ("binding", "ellipsis")]
    assert math.isclose(entry["accuracy_over_files"], sum(per_file) / 2)
    assert math.isclose(entry["accuracy_over_fields"], sum(per_field) / 2)
    assert saved["convention"] == convention
    for field in ("binding", "ellipsis"):
        assert math.isclose(entry["per_field"][field], right[saved["field"] == field].mean())


# ---- what is refused


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            assert key in config
            config[key] = value
        path.write_text(json.dumps(config))

    return change


def change_tensors(change):
    def rewrite(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path, {"format": "pt"})

    return rewrite


def change_bytes(change):
    def rewrite(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LOSSLESS |= {"add_dummy_prefix": False, "character_coverage": 1.0}


def sentencepiece_model(**options):
    """The bytes of a SentencePiece model such as others train."""
    defaults = {"vocab_size": 290, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    if "pad_id" not in options:
        defaults |= {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(write_text(2000, 1).split("\n")),
        model_writer=written,
        hard_vocab_limit=False,
        **defaults | options,
    )
    return written.getvalue()


def another_tokenizer(**options):
    return lambda folder: (folder / "tokenizer.model").write_bytes(sentencepiece_model(**options))


def test_special_ids_are_those_of_the_tokenizer(tmp_path):
    tokenizer = Tokenizer(sentencepiece_model(**LOSSLESS, pad_id=-1, bos_id=1, eos_id=2, unk_id=0))
    model = models.build_model("llama-tiny", tokenizer.vocabulary_size)
    save_model(tmp_path / "a.pt", model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(export(tmp_path / "a.pt"))
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.pad_token_id == 0  # unk stands for the one that is missing
    for text in NASTY:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert import_back(tmp_path / "exported", tmp_path / "back.pt") == 0


@pytest.mark.parametrize("checkpoint", ["llama-tiny", "gpt2-tiny"], indirect=True)
def test_rows_beyond_the_tokenizers_are_left_out(checkpoint, tmp_path, capsys):
    folder = export(checkpoint)
    padded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    padded.resize_token_embeddings(pad_to_multiple_of=64)
    padded.save_pretrained(folder)
    assert import_back(folder, tmp_path / "back.pt") == 0
    assert "20 rows beyond the tokenizer's 300 pieces are left out" in capsys.readouterr().out
    before, after = (read_checkpoint(path) for path in (checkpoint, tmp_path / "back.pt"))
    assert after["model"]["shape"]["vocab_size"] == V
    assert all(torch.equal(before["weights"][name], w) for name, w in after["weights"].items())


@pytest.mark.parametrize("checkpoint", ["llama-tiny"], indirect=True)
def test_weights_that_no_program_could_use_are_not_imported(checkpoint, tmp_path, capsys):
    folder = export(checkpoint)
    change_tensors(lambda t: t[NORM].fill_(math.nan))(folder)
    assert import_back(folder, tmp_path / "back.pt") == 1
    assert "is no model that could be used" in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()


NORM = "model.norm.weight"
LLAMA_FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "does not describe"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "does not describe"),
    "another architecture": (change_config(model_type="mistral"), "only llama and gpt2"),
    "another width": (change_config(hidden_size=192, head_dim=48), "implies"),
    "an absurd width": (change_config(hidden_size=1 << 40), "config.json"),
    "a negative size": (change_config(num_hidden_layers=-1), "does not describe"),
    "no layers to divide by": (change_config(num_attention_heads=0), "does not describe"),
    "more layers": (change_config(num_hidden_layers=4), "lacks"),
    "fewer layers": (change_config(num_hidden_layers=2), "has not"),
    "a million positions": (change_config(max_position_embeddings=1 << 40), "does not describe"),
    "grouped queries": (change_config(num_key_value_heads=2), "num_key_value_heads"),
    "biases": (change_config(attention_bias=True), "attention_bias"),
    "another activation": (change_config(hidden_act="gelu"), "hidden_act"),
    "rope scaling": (change_config(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "rope scaling"),
    "old rope scaling beside new": (
        change_config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
        "rope scaling",
    ),
    "old rope scaling": (change_config(rope_parameters=None, rope_scaling={"type": "linear"}), "rope"),
    "two lines in a value": (change_config(hidden_act="x\nTraceback"), "hidden_act"),
    "heads of an odd size": (
        change_config(num_attention_heads=32, num_key_value_heads=32, head_dim=3),
        "even",
    ),
    "no positions to turn": (
        change_config(rope_theta=0.0, rope_parameters={"rope_type": "default"}),
        "theta",
    ),
    "a head where it is tied": (change_config(tie_word_embeddings=True), "tied"),
    "no head where it is not tied": (change_tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "a tensor more": (change_tensors(lambda t: t.update(x=torch.zeros(1))), "has not"),
    "integers": (change_tensors(lambda t: t.update({NORM: torch.zeros(96, dtype=torch.int32)})), "int32"),
    "sharded": (shard, "several files"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "does not exist"),
    "cut short": (change_bytes(lambda b: b[:-5]), "damaged"),
    "longer": (change_bytes(lambda b: b + b"x"), "damaged"),
    "empty": (change_bytes(lambda b: b""), "damaged"),
    "a name of two lines": (change_tensors(lambda t: t.update({"a\nb": torch.zeros(1)})), "has not"),
    "a tensor twice": (change_tensors(lambda t: t.update({"norm.weight": torch.zeros(96)})), "twice"),
    "no SentencePiece": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model"),
    "no tokenizer at all": (lambda f: (f / "tokenizer.model").write_bytes(b"hello"), "not a SentencePiece"),
    "an empty tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b""), "not a SentencePiece"),
    "a lossy tokenizer": (another_tokenizer(), "another kind"),
    "a unigram": (another_tokenizer(**LOSSLESS, model_type="unigram"), "another kind"),
    "pieces of one's own": (
        another_tokenizer(**LOSSLESS, user_defined_symbols=["dog", "\n"]),
        "another kind",
    ),
}


@pytest.mark.parametrize("fault", LLAMA_FAULTS)
@pytest.mark.parametrize("checkpoint", ["llama-tiny"], indirect=True)
def test_a_folder_that_is_not_ours_to_read_is_one_line(checkpoint, tmp_path, fault, capsys):
    folder = export(checkpoint)
    capsys.readouterr()
    break_it, expected = LLAMA_FAULTS[fault]
    break_it(folder)
    assert import_back(folder, tmp_path / "back.pt") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and expected in message
    assert not (tmp_path / "back.pt").exists()


GPT2_FAULTS = {
    "activation_function": {"activation_function": "gelu"},
    "scale_attn_weights": {"scale_attn_weights": False},
    "attn_pdrop": {"attn_pdrop": 0.5},
    "tie_word_embeddings": {"tie_word_embeddings": False},
    "implies": {"n_inner": 100},
    "dropout": {"resid_pdrop": 5.0, "embd_pdrop": 5.0, "attn_pdrop": 5.0},
}


@pytest.mark.parametrize("checkpoint", ["gpt2-tiny"], indirect=True)
@pytest.mark.parametrize("expected", GPT2_FAULTS)
def test_a_gpt2_that_computes_otherwise_is_refused(checkpoint, tmp_path, expected, capsys):
    folder = export(checkpoint)
    capsys.readouterr()
    change_config(**GPT2_FAULTS[expected])(folder)
    assert import_back(folder, tmp_path / "back.pt") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and expected in message
    assert not (tmp_path / "back.pt").exists()


def test_nothing_is_overwritten(checkpoint, tmp_path, capsys):
    before = checkpoint.read_bytes()
    folder = export(checkpoint)
    assert import_back(folder, checkpoint) == 1 and checkpoint.read_bytes() == before
    (folder / "README.md").write_text("years of work")
    assert run_program(lambda: export_hf.main([str(checkpoint), "--out", str(folder)])) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "years of work"


def test_wrong_usage_is_exit_code_2(checkpoint):
    for arguments in (
        [],
        [str(checkpoint), "--import", "x"],
        ["--import", "x", "--start-token", "newline"],
    ):
        with pytest.raises(SystemExit) as raised:
            export_hf.main([*arguments, "--out", "y"])
        assert raised.value.code == 2
