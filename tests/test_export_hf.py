"""What is exported loads with stock classes and scores the same; what comes back is the same."""

import dataclasses
import io
import json
import math
import sys

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import tokenizers
import torch
import transformers

import distill
import evaluate
import export_hf
import model as models
from benchmarks.reference import hugging_face_model
from conftest import same, save_model, train_tokenizer, write_text
from distill import DistillConfig
from published import NASTY
from tokenizer import BOS, EOS, Tokenizer
from training.checkpoint import read_checkpoint
from training.io import run_program
from training.options import may_change

V = 300
one_kind = pytest.mark.parametrize("checkpoint", ["llama-tiny"], indirect=True)


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
    assert export_hf.main([str(checkpoint), *map(str, options), "--out", str(out)]) is None
    return out


def refused(capsys, *arguments):
    """What the program writes to standard error: one line."""
    capsys.readouterr()
    assert run_program(lambda: export_hf.main([*map(str, arguments)])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def import_back(folder, out):
    assert export_hf.main(["--import", str(folder), "--out", str(out)]) is None
    return read_checkpoint(out)


def largest_difference(ours, theirs, tokens):
    """Between the logits of both models, relative to the largest logit."""
    with torch.no_grad():
        logits = theirs.eval()(tokens).logits
        return (ours(tokens) - logits).abs().max() / logits.abs().max()


def test_stock_classes_load_the_folder_and_compute_the_same(checkpoint):
    folder = export(checkpoint)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(theirs).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel")
    ours, _ = models.load_checkpoint(checkpoint)
    assert largest_difference(ours, theirs, torch.randint(V, (2, 40))) <= 1e-5
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


def test_a_tokenizer_with_long_merges_is_the_same_too():
    """A tokenizer with a larger vocabulary, whose pieces can be split in several ways."""
    text = write_text(4000, seed=11) + "banana bandana cabana anagram aaaa aaaaaaa abab " * 50
    tokenizer = train_tokenizer(text, 400)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(export_hf.hf_tokenizer(tokenizer)))
    for line in [*text.split("\n"), "bananananabandananana", "aaaaaaaaaaaaaaa", *NASTY]:
        assert theirs.encode(line).ids == tokenizer.encode(line), line


@one_kind
def test_two_texts_as_a_pair_are_parted_by_a_newline(checkpoint, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(export(checkpoint))
    ids = theirs("She came. Yet", "the dog ran.")["input_ids"]
    assert ids == tokenizer.encode("She came. Yet\nthe dog ran.")


def test_llama_cpp_is_told_to_put_nothing_before_a_prompt(checkpoint):
    folder = export(checkpoint)
    config, tokenizer_config = (
        json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    keys = ("add_bos_token", "add_eos_token", "add_prefix_space")
    assert [tokenizer_config[key] for key in keys] == [False] * 3
    assert config.get("n_ctx", 256) == 256 and ("n_ctx" in config) == (config["model_type"] == "gpt2")


def test_a_llama_can_be_given_longer_texts_and_a_gpt2_cannot(checkpoint, capsys):
    ours, saved = models.load_checkpoint(checkpoint)
    if saved["model"]["architecture"] == "gpt2":
        error = refused(capsys, checkpoint, "--out", checkpoint.parent / "long", "--positions", 512)
        assert "or more if it is a LLaMA" in error
        return
    out = export(checkpoint, "--positions", 512, out="long")
    card = (out / "README.md").read_text()
    assert "It has 512 positions" in card and "Beyond 256 positions nothing" in card
    error = refused(capsys, checkpoint, "--out", checkpoint.parent / "short", "--positions", 64)
    assert "give 256 for" in error
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.config.max_position_embeddings == tokenizer.model_max_length == 512
    assert largest_difference(ours, theirs, torch.randint(V, (1, 200))) <= 1e-5
    assert theirs(torch.randint(V, (1, 512))).logits.isfinite().all()


@one_kind
def test_several_checkpoints_become_a_folder_each(checkpoint, capsys):
    marks = [checkpoint.parent / f"chck_{n}M.pt" for n in (1, 2)]
    for mark in marks:
        mark.write_bytes(checkpoint.read_bytes())
    out = checkpoint.parent / "marks"
    assert export_hf.main([*map(str, marks), "--out", str(out)]) is None
    assert sorted(p.name for p in out.iterdir()) == ["chck_1M", "chck_2M"]
    assert (out / "chck_2M" / "config.json").exists()
    marks[1].write_bytes(b"damaged")
    assert "damaged" in refused(capsys, *marks, "--out", out / "x") and not (out / "x").exists()


@one_kind
def test_files_of_one_name_become_folders_of_their_runs_names(checkpoint, capsys):
    paths = [checkpoint.parent / task / "seed-0" / "best.pt" for task in ("rte", "mrpc")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_bytes(checkpoint.read_bytes())
    out = checkpoint.parent / "both"
    assert export_hf.main([*map(str, paths), "--out", str(out)]) is None
    assert sorted(p.name for p in out.iterdir()) == ["mrpc-seed-0", "rte-seed-0"]
    assert "given twice" in refused(capsys, *paths, paths[0], "--out", out / "x")


def test_weights_in_bf16_are_those_of_the_checkpoint_rounded(checkpoint):
    folder = export(checkpoint, "--dtype", "bf16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    as_stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in as_stored.parameters()} == {torch.bfloat16}
    ours, _ = models.load_checkpoint(checkpoint)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.bfloat16())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert largest_difference(ours, theirs, torch.randint(V, (2, 40))) <= 1e-5
    assert same(import_back(folder, checkpoint.parent / "back.pt")["weights"], ours.state_dict())


def test_the_card_names_a_licence_and_languages_only_where_they_are_given(checkpoint):
    from huggingface_hub import ModelCard

    data = ModelCard.load(export(checkpoint) / "README.md").data
    assert data.license is data.language is data.base_model is None
    given = ["--license", "apache-2.0", "--language", "nl", "fy", "--base-model", "someone/base"]
    data = ModelCard.load(export(checkpoint, *given, out="given") / "README.md").data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["nl", "fy"], "someone/base")


def test_the_card_states_what_the_checkpoint_knows(checkpoint):
    card = (export(checkpoint) / "README.md").read_text(encoding="utf-8")
    facts = ["steps taken | 7", "words seen | 1,234", "4.5000", "abc123", "learning rate | 0.003"]
    facts += ["gpt2-tiny", "300 pieces", "dropout | 0.", "as initialised"]
    assert [fact for fact in facts if fact not in card] == []


def test_the_card_has_every_option_that_makes_the_model_what_it_is():
    """An option of training is in the card's recipe, or says only where and how fast it is trained."""
    elsewhere = may_change(DistillConfig) - {"dropout", "patience"}
    elsewhere |= {"model", "shape", "objective", "eval_every", "eval_sequences"}
    assert {field.name for field in dataclasses.fields(DistillConfig)} - elsewhere <= set(
        export_hf.CARD_OPTIONS
    )


@one_kind
def test_the_card_has_the_scores_of_its_own_checkpoint(checkpoint, tmp_path, capsys):
    entry = {"digest": read_checkpoint(checkpoint)["digest"], "cross_entropy": 4.25, "bits_per_byte": None}
    entry["pairs"] = {"blimp": {"accuracy_over_files": 0.625}}
    other, scores = entry | {"digest": "another"}, tmp_path / "scores.json"
    scores.write_text(json.dumps({"checkpoints": [other, entry]}))
    card = (export(checkpoint, "--scores", scores) / "README.md").read_text()
    assert "| cross entropy | 4.2500 |" in card and "| minimal pairs of blimp | 62.5 % |" in card
    scores.write_text(json.dumps({"checkpoints": [other]}))
    error = refused(capsys, checkpoint, "--out", tmp_path / "x", "--scores", scores)
    assert "no scores of" in error and not (tmp_path / "x").exists()


def test_the_cards_example_runs(checkpoint, monkeypatch, capsys):
    example = (export(checkpoint) / "README.md").read_text().split("```")[1].removeprefix("python")
    monkeypatch.chdir(checkpoint.parent)
    exec(example, {})
    assert "Once" in capsys.readouterr().out


@one_kind
@pytest.mark.parametrize("package", ["tokenizers", "safetensors.torch"])
def test_without_the_extras_packages_one_line_says_what_to_install(checkpoint, package, monkeypatch, capsys):
    folder, out = export(checkpoint), checkpoint.parent / "out"
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install safetensors tokenizers" in refused(capsys, checkpoint, "--out", out)
    if package != "tokenizers":
        assert "pip install safetensors tokenizers" in refused(capsys, "--import", folder, "--out", out)
    assert not out.exists()


def test_a_start_token_can_take_the_newlines_place(checkpoint, tokenizer, capsys):
    ours, saved = models.load_checkpoint(checkpoint)
    if saved["model"]["architecture"] == "gpt2":
        error = refused(capsys, checkpoint, "--out", checkpoint.parent / "no", "--start-token", "newline")
        assert "leave out --start-token" in error and not (checkpoint.parent / "no").exists()
        return
    folder = export(checkpoint, "--start-token", "newline")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([tokenizer.encode("\nthe cat")])
    expected = ours(tokens)
    for special in (BOS, EOS):
        tokens[0, 0] = special
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-4)
    assert "copies of the newline's" in (folder / "README.md").read_text()


def test_an_exported_checkpoint_comes_back_unchanged_and_claims_no_training(checkpoint, tmp_path):
    before, after = read_checkpoint(checkpoint), import_back(export(checkpoint), tmp_path / "back.pt")
    assert before["model"]["shape"] == after["model"]["shape"]
    assert before["tokenizer"]["identity"] == after["tokenizer"]["identity"]
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
    card = (export(tmp_path / "back.pt", out="again") / "README.md").read_text()
    assert "never occurred" not in card and "dropout" not in card


@one_kind
def test_a_folder_with_the_tokenizer_of_another_model_is_refused(checkpoint, tmp_path, capsys):
    folder, out = export(checkpoint), tmp_path / "back.pt"
    (folder / "tokenizer.model").write_bytes(train_tokenizer(write_text(2000, seed=8)).model_bytes)
    assert "have different pieces" in refused(capsys, "--import", folder, "--out", out)
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be read" in refused(capsys, "--import", folder, "--out", out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_that_transformers_wrote_is_read(checkpoint, tmp_path, tokenizer, dtype):
    ours, _ = models.load_checkpoint(checkpoint)
    twin = hugging_face_model(ours, weights=False).to(dtype)
    twin.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    import_back(tmp_path / "theirs", tmp_path / "back.pt")
    back, _ = models.load_checkpoint(tmp_path / "back.pt")
    twin = type(twin).from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert largest_difference(back, twin, torch.randint(V, (2, 30))) <= 1e-5


def test_what_was_imported_can_teach_and_be_trained_further(checkpoint, tmp_path, data_folder):
    before, back = import_back(export(checkpoint), tmp_path / "back.pt"), tmp_path / "back.pt"
    arguments = ["--teachers", back, "--init", back, "--model", "llama-tiny-student", "--data", data_folder]
    arguments += ["--out", tmp_path / "run", "--steps", "1", "--learning-rate", "0"]
    arguments += ["--batch-size", "4", "--sequence-length", "32", "--device", "cpu"]
    assert distill.main(list(map(str, arguments))) == 0
    after = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
    card = (export(tmp_path / "run" / "best.pt", out="trained") / "README.md").read_text()
    facts = ("cleaning | none", "initialised from | ", "alpha | 0.5", "clip | 1.0", "teachers | exported")
    assert [fact for fact in facts if fact not in card] == []
    if "dropout" not in before["model"]["shape"]:
        log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
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
    (tmp_path / "pairs").mkdir()
    words, sides = write_text(400, seed=5).split(), ("sentence_good", "sentence_bad")
    sentences = [(words[i : i + 4], words[i + 3 : i + 8]) for i in range(0, 200, 8)]
    pairs = [dict(zip(sides, map(" ".join, pair))) for pair in sentences]
    (tmp_path / "pairs" / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    arguments = [str(checkpoint), "--pairs", str(tmp_path / "pairs"), "--convention", convention]
    arguments += ["--device", "cpu", "--pair-scores", str(tmp_path / "s.npz")]
    assert run_program(lambda: evaluate.main(arguments)) == 0
    saved = np.load(tmp_path / "s.npz")
    folder = export(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for side in ("good", "bad"):
        theirs = [their_score(model, tokenizer, pair[f"sentence_{side}"], convention) for pair in pairs]
        np.testing.assert_allclose(saved[side][0], theirs, rtol=0, atol=1e-4)


def their_completion_score(model, tokenizer, sentence, completion):
    """log p of the tokens that reach into a sentence's completion, as the pipeline of 2025 does it."""
    encoded = tokenizer(sentence, return_offsets_mapping=True)
    ids, start = torch.tensor([encoded["input_ids"]]), len(sentence) - len(completion)
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
    return sum(p.item() for p, (_, end) in zip(log_p, encoded["offset_mapping"][1:]) if end > start)


@one_kind
def test_ewok_and_comps_are_scored_and_predicted_as_the_pipeline_does(checkpoint, tmp_path):
    words = write_text(600, seed=6).split()
    texts = [" ".join(words[i : i + 5]) for i in range(0, 450, 5)]
    triples = [texts[i : i + 3] for i in range(0, 90, 3)]
    ewok = [dict(zip(("Context1", "Target1", "Target2"), t)) | {"Domain": "social"} for t in triples]
    fields = ("prefix_acceptable", "prefix_unacceptable", "property_phrase")
    comps = [dict(zip(fields, triple)) for triple in triples]
    for name, entries in (("social", ewok), ("comps_wugs_dist-before", comps)):
        path = tmp_path / ("ewok_fast" if entries is ewok else "comps") / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    command = [str(checkpoint), "--pairs", str(tmp_path / "ewok_fast"), str(tmp_path / "comps")]
    command += ["--convention", "2025", "--device", "cpu", "--pair-scores", str(tmp_path / "s.npz")]
    assert run_program(lambda: evaluate.main([*command, "--predictions", str(tmp_path / "main")])) == 0
    folder = export(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sides = [[(f"{c} {t}", f" {t}") for t in targets] for c, *targets in triples]
    sides += [[(f"{prefix} {phrase}", phrase) for prefix in prefixes] for *prefixes, phrase in triples]
    theirs = np.array([[their_completion_score(model, tokenizer, *side) for side in pair] for pair in sides])
    saved = np.load(tmp_path / "s.npz")
    np.testing.assert_allclose(np.stack([saved["good"][0], saved["bad"][0]], 1), theirs, rtol=0, atol=1e-4)
    choices = theirs.argmax(1)
    assert 0 < choices.sum() < len(choices)
    for task, path, group, part in (
        ("ewok", "ewok_fast", "social", 1),
        ("comps", "comps", "wugs_dist_before", 0),
    ):
        pairs = list(zip(sides, choices))[:30] if task == "ewok" else list(zip(sides, choices))[30:]
        expected = [{"id": f"{group}_{i}", "pred": pair[c][part]} for i, (pair, c) in enumerate(pairs)]
        path = tmp_path / "main" / "zero_shot" / "causal" / task / path / "predictions.json"
        assert json.loads(path.read_text()) == {group: {"predictions": expected}}


# ---- what is refused


def change_bytes(change):
    def rewrite(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def change_tensors(change):
    def changed(data):
        tensors = safetensors.torch.load(data)
        change(tensors)
        return safetensors.torch.save(tensors, {"format": "pt"})

    return change_bytes(changed)


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
    tokenizer = Tokenizer.read(sentencepiece_model(**LOSSLESS, pad_id=-1, bos_id=1, eos_id=2, unk_id=0))
    model = models.build_model("llama-tiny", tokenizer.vocabulary_size)
    save_model(tmp_path / "a.pt", model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(export(tmp_path / "a.pt"))
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.pad_token_id == 0  # unk stands for the one that is missing
    for text in NASTY:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    import_back(tmp_path / "exported", tmp_path / "back.pt")


def test_rows_beyond_the_tokenizers_are_left_out(checkpoint, tmp_path, capsys):
    folder = export(checkpoint)
    padded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    padded.resize_token_embeddings(pad_to_multiple_of=64)
    padded.save_pretrained(folder)
    after = import_back(folder, tmp_path / "back.pt")
    assert "20 rows beyond the tokenizer's 300 pieces are left out" in capsys.readouterr().out
    weights = read_checkpoint(checkpoint)["weights"]
    assert after["model"]["shape"]["vocab_size"] == V
    assert all(torch.equal(weights[name], weight) for name, weight in after["weights"].items())


NORM = "model.norm.weight"
LLAMA_CONFIGS = [
    ({"model_type": "mistral"}, "only llama and gpt2"),
    ({"hidden_size": 192, "head_dim": 48}, "implies"),
    ({"hidden_size": 1 << 40}, "config.json"),
    ({"num_hidden_layers": -1}, "does not describe"),
    ({"num_attention_heads": 0}, "does not describe"),
    ({"num_hidden_layers": 4}, "lacks"),
    ({"num_hidden_layers": 2}, "has not"),
    ({"max_position_embeddings": 1 << 40}, "does not describe"),
    ({"num_key_value_heads": 2}, "implies"),
    ({"num_key_value_heads": 3}, "do not divide"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "x\nTraceback"}, "hidden_act"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope scaling"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope scaling"),
    ({"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 3}, "even"),
    ({"rope_theta": 0.0, "rope_parameters": {"rope_type": "default"}}, "theta"),
    ({"tie_word_embeddings": True}, "tied"),
]
GPT2_CONFIGS = [
    ({"activation_function": "gelu"}, "activation_function"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"attn_pdrop": 0.5}, "attn_pdrop"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"n_inner": 100}, "implies"),
    ({"resid_pdrop": 5.0, "embd_pdrop": 5.0, "attn_pdrop": 5.0}, "dropout"),
]


@pytest.mark.parametrize(
    "checkpoint, faults",
    [("llama-tiny", LLAMA_CONFIGS), ("gpt2-tiny", GPT2_CONFIGS)],
    indirect=["checkpoint"],
)
def test_a_config_of_another_computation_is_refused(checkpoint, faults, tmp_path, capsys):
    path = export(checkpoint) / "config.json"
    config = json.loads(path.read_text())
    for changes, expected in faults:
        assert changes.keys() <= config.keys()
        path.write_text(json.dumps(config | changes))
        assert expected in refused(capsys, "--import", path.parent, "--out", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "does not describe"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "does not describe"),
    "no head where it is not tied": (change_tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "a tensor more": (change_tensors(lambda t: t.update(x=torch.zeros(1))), "has not"),
    "a name of two lines": (change_tensors(lambda t: t.update({"a\nb": torch.zeros(1)})), "has not"),
    "integers": (change_tensors(lambda t: t.update({NORM: torch.zeros(96, dtype=torch.int32)})), "int32"),
    "not finite": (change_tensors(lambda t: t[NORM].fill_(math.nan)), "is no model that could be used"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "download the whole model"),
    "cut short": (change_bytes(lambda b: b[:-5]), "damaged"),
    "longer": (change_bytes(lambda b: b + b"x"), "damaged"),
    "empty": (change_bytes(lambda b: b""), "damaged"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer.*")],
        "has no tokenizer.model, tokenizer",
    ),
    "no SentencePiece": (lambda f: (f / "tokenizer.model").write_bytes(b"hello"), "not a SentencePiece"),
    "a lossy tokenizer": (another_tokenizer(), "a newline is no piece"),
    "a unigram": (another_tokenizer(**LOSSLESS, model_type="unigram"), "another kind"),
    "pieces of one's own": (
        another_tokenizer(**LOSSLESS, user_defined_symbols=["dog"]),
        "pieces of its user",
    ),
    "normalisation": (another_tokenizer(**LOSSLESS | {"normalization_rule_name": "nfkc"}), "changes text"),
}


@one_kind
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_ours_to_read_is_one_line(checkpoint, tmp_path, fault, capsys):
    folder = export(checkpoint)
    break_it, expected = FAULTS[fault]
    break_it(folder)
    assert expected in refused(capsys, "--import", folder, "--out", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


@one_kind
def test_nothing_is_overwritten(checkpoint, capsys):
    before, folder = checkpoint.read_bytes(), export(checkpoint)
    assert "choose another --out" in refused(capsys, "--import", folder, "--out", checkpoint)
    (folder / "README.md").write_text("years of work")
    assert "choose another --out" in refused(capsys, checkpoint, "--out", folder)
    assert checkpoint.read_bytes() == before and (folder / "README.md").read_text() == "years of work"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "a.pt --import x",
        "--import x --start-token newline",
        "--import x --dtype bf16",
        "a.pt --positions 0",
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    with pytest.raises(SystemExit) as raised:
        export_hf.main([*arguments.split(), "--out", "y"])
    assert raised.value.code == 2
