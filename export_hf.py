"""Exports a checkpoint to Hugging Face's stock classes, and imports one of theirs.

    python export_hf.py runs/distilled-llama-58m/best.pt --out babyllama-58m
    python export_hf.py runs/distilled-llama-58m/chck_*.pt --out marks         a folder for each
    python export_hf.py runs/finetune/llama-58m/*/seed-0/best.pt --out glue    and classifiers
    python export_hf.py --import babyllama-58m --out babyllama-58m.pt

transformers 4.51 and 5.x load the folder with `AutoModelForCausalLM` (a classifier of finetune.py with
`AutoModelForSequenceClassification`) and `AutoTokenizer`, without trust_remote_code. evaluate.py scores
what is imported, train.py --init trains it further, and it teaches students whose data has the same
tokenizer. Needs the packages safetensors and tokenizers.
"""

import argparse
import dataclasses
import html
import importlib
import json
import sys
from pathlib import Path

import torch

from data import TokenShard
from finetuning.classifier import is_classifier, load_any
from gpt2 import GPT2Config
from llama import LlamaConfig
from model import ARCHITECTURES, build, check_shape, count_parameters, load_checkpoint
from tokenizer import BOS, EOS, PAD, JsonTokenizer, Tokenizer
from training.checkpoint import checkpoint_names, write_checkpoint
from training.io import UserError, atomic_write, log, printable, run_program, write_json, write_text
from training.options import Parser

# Fields of our configs, under Hugging Face's names where those differ.
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "dropout": "resid_pdrop",
}
HF_FIELDS = {  # {architecture: {our field: theirs}}; a LLaMA's dropout has no name there
    "llama": {f.name: f.name for f in dataclasses.fields(LlamaConfig) if f.name != "dropout"},
    "gpt2": {f.name: GPT2_NAMES.get(f.name, f.name) for f in dataclasses.fields(GPT2Config)},
}
# What our forward passes compute; a config with other values is of another model.
FIXED = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
}
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
CLASSIFIERS = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}
PREFIXES = {"llama": "model.", "gpt2": "transformer."}
HEAD, SCORE = "lm_head.weight", "score.weight"  # the parameters without the prefix
EMBEDDING = {"llama": "embed_tokens.weight", "gpt2": "wte.weight"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D keeps (in, out)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # constants in older files
DEFAULT_POSITIONS = {"llama": 2048, "gpt2": 1024}  # of a config.json that does not say it
SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}  # of our own tokenizers
# Text that a lossy tokenizer would change: runs of blanks, a tab, a ligature, a no-break space.
PROBE = "a  b\n\n\tﬁ ½\u00a0e\u0301 "
CARD_OPTIONS = (
    *("epochs", "steps", "batch_size", "sequence_length", "random_offset", "seed"),
    *("optimizer", "learning_rate", "schedule", "min_lr_ratio", "warmup_steps", "beta2", "clip"),
    *("average_last", "weight_decay", "no_decay", "dropout", "label_smoothing", "precision", "patience"),
    *("alpha", "temperature", "kl_reduction", "teacher_weights"),
)
PROGRESS = {
    "step": "steps taken",
    "words": "words seen",
    "dev_cross_entropy": "last dev cross-entropy (nats)",
    **{score: score for score in ("accuracy", "f1", "mcc")},  # of a classifier, on its valid file
}
CARD_SCORES = ("cross_entropy", "perplexity_per_word", "bits_per_byte")  # of evaluate.py --json
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [babylm, baby-llama]
{metadata}---

# {name}

Written by a reimplementation of [Baby Llama](https://arxiv.org/abs/2308.02019).

```python
from transformers import AutoModelFor{kind}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelFor{kind}.from_pretrained({folder!r})
{example}
```

| fact | value |
|---|---|
{facts}
"""
EXAMPLES = {
    "CausalLM": """inputs = tokenizer('\\nOnce', return_tensors='pt')  # in training, lines follow a newline
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))""",
    "SequenceClassification": """inputs = tokenizer(['A text.'], return_tensors='pt')  # of pairs, two lists
print([model.config.id2label[int(i)] for i in model(**inputs).logits.argmax(-1)])""",
}


def import_extra(name):
    """Returns a package of the extra `hf`. Raises `UserError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: pip install safetensors tokenizers") from error


# ---- export: the weights and the config


def hf_name(architecture, name):
    """Returns the name of a parameter in Hugging Face's state dict."""
    return name if name in (HEAD, SCORE) else PREFIXES[architecture] + name


def is_transposed(architecture, name):
    """Returns True for a matrix that Hugging Face keeps as (in, out)."""
    return architecture == "gpt2" and name.endswith(TRANSPOSED)


def hf_weights(architecture, weights, dtype="fp32"):
    """Returns our state dict as Hugging Face's: other names, Conv1D's matrices transposed, rounded."""
    return {
        hf_name(architecture, name): (w.T if is_transposed(architecture, name) else w)
        .to(DTYPES[dtype])
        .contiguous()
        for name, w in weights.items()
    }


def hf_config(model, architecture, classes=(), special_ids=SPECIAL_IDS, dtype="fp32"):
    """Returns config.json, with the keys of transformers 4 and 5 where they differ.

    `classes` are the names of a classifier's classes, `dtype` one of `DTYPES`.
    """
    shape = dataclasses.asdict(model.config)
    config = {"architectures": [CLASSES[architecture]], "model_type": architecture}
    config |= {theirs: shape[ours] for ours, theirs in HF_FIELDS[architecture].items()}
    config |= FIXED[architecture] | special_ids
    if architecture == "llama":
        heads = shape["num_attention_heads"]
        config["num_key_value_heads"] = shape["num_key_value_heads"] or heads
        config["head_dim"] = shape["head_dim"] or shape["hidden_size"] // heads
        rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
        config |= {"rope_scaling": None, "rope_parameters": rope}
    else:
        config |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), shape["dropout"])
        config["n_ctx"] = shape["max_position_embeddings"]  # llama.cpp reads this older name
    if classes:
        config["architectures"] = [CLASSIFIERS[architecture]]
        config |= {
            "id2label": {str(i): name for i, name in enumerate(classes)},
            "label2id": {name: i for i, name in enumerate(classes)},
            "problem_type": "single_label_classification",
        }
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return config | {"torch_dtype": name, "dtype": name, "use_cache": True}


# ---- export: the tokenizer


def is_json(tokenizer):
    """Returns True for a tokenizer.json."""
    return isinstance(tokenizer, JsonTokenizer)


def is_normal(processor, i):
    """Returns True for a piece of text: no control piece, byte, unknown or unused one."""
    kinds = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    return not any(kind(i) for kind in kinds)


def check_tokenizer(tokenizer, path):
    """Raises `UserError` for a tokenizer that tokenizer.json cannot describe, or that loses text."""
    problem = None
    if not is_json(tokenizer):
        processor, size = tokenizer.processor, tokenizer.vocabulary_size
        # A BPE's are 0, -1, -2, ... in the order of merging, unlike those of a unigram or of user-defined
        # pieces.
        scores = [processor.get_score(i) for i in range(size) if is_normal(processor, i)]
        if scores != [-float(i) for i in range(len(scores))]:
            problem = "it is no BPE, or has pieces of its user"
        elif tokenizer.encode("\n") != [processor.piece_to_id("<0x0A>")]:
            problem = "a newline is no piece of it"
        elif tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            problem = "it changes text, such as runs of blanks"
    if tokenizer.encode("a\nb") != tokenizer.encode("a\n") + tokenizer.encode("b"):
        problem = "the tokens of lines are not those of a text"
    if problem:
        raise UserError(f"{path}: a tokenizer of another kind than those that are read: {problem}")


def special_ids_of(tokenizer):
    """Returns {"pad_token_id": ..., "bos_token_id", "eos_token_id", "unk_token_id"}, those that exist.

    Transformers' classifiers need a padding token: without one it is unk or eos, which text never becomes.
    """
    padding = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id)
    pad = next((i for i in padding if i is not None), None)
    ids = {"pad": pad, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id}
    return {f"{name}_token_id": i for name, i in ids.items() if i is not None}


def hf_tokenizer(tokenizer, as_published=False):
    """Returns tokenizer.json, which tokenizes as in training: lines as parts of a text.

    If `as_published`, it tokenizes as that of the imported model, which may put a blank before a text.
    """
    if is_json(tokenizer) and as_published:
        content = json.loads(tokenizer.model_bytes)
        return {key: value for key, value in content.items() if key != "special_ids"}
    tokenizers = import_extra("tokenizers")
    if is_json(tokenizer):
        result = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.content))
    else:
        result = sentencepiece_bpe(tokenizer, as_published and tokenizer.adds_space)
    # The second text of a pair begins on a line of its own, as in training.
    newline = tokenizer.encode("\n")
    separator = {"id": "newline", "ids": newline, "tokens": [tokenizer.piece(i) for i in newline]}
    result.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A:0", pair="$A:0 newline:0 $B:0", special_tokens=[separator]
    )
    return json.loads(result.to_str())


def sentencepiece_bpe(tokenizer, adds_space):
    """Returns a SentencePiece model as a BPE of the library `tokenizers`.

    tokenizer.model alone would not do: LlamaTokenizer splits text without a dummy prefix otherwise than
    SentencePiece. Pieces are numbered in the order in which SentencePiece merges, so that a merge's rank
    is the number of its result; each way to split a piece into two others is a merge of that rank.
    """
    tokenizers = import_extra("tokenizers")
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(i) for i in range(tokenizer.vocabulary_size)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    normal = {piece for i, piece in enumerate(pieces) if is_normal(processor, i)}
    splits = sorted(
        (ids[piece], ids[piece[:i]], ids[piece[i:]])
        for piece in normal
        for i in range(1, len(piece))
        if piece[:i] in normal and piece[i:] in normal
    )
    merges = [(pieces[left], pieces[right]) for _, left, right in splits]
    bpe = tokenizers.models.BPE(
        ids, merges, unk_token=pieces[tokenizer.unk_id], fuse_unk=True, byte_fallback=True
    )
    result = tokenizers.Tokenizer(bpe)
    special = [pieces[i] for i in sorted(set(special_ids_of(tokenizer).values()))]
    result.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in special])
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    result.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space:
        result.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), result.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    result.decoder = decoders.Sequence(steps)
    return result


def hf_tokenizer_config(tokenizer, context, as_published=False):
    """Returns tokenizer_config.json, and special_tokens_map.json, which only transformers 4 reads."""
    special = {key.removesuffix("_id"): tokenizer.piece(i) for key, i in special_ids_of(tokenizer).items()}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without this 4.51 adds token_type_ids, which GPT-2 turns into embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": as_published and tokenizer.adds_space,
    }
    if not (is_json(tokenizer) and as_published):
        # Without these llama.cpp puts <s> before each prompt, which training never saw.
        config |= {"add_bos_token": False, "add_eos_token": False}
    return config, special


# ---- export: the card


def plain(value):
    """Returns a value as one line of text without markup, in Markdown and in a table of it."""
    return html.escape(printable(str(value))).replace("|", "\\|")


def card_facts(checkpoint, model):
    """Returns {fact: value} of what a checkpoint knows of its origin and recipe."""
    config, progress = checkpoint["config"], checkpoint["progress"]
    description = Tokenizer.read(checkpoint["tokenizer"]["model"].numpy()).description
    facts = {
        "model": f"{checkpoint['model']['name']}, {count_parameters(model):,} parameters",
        "teachers": ", ".join(f"{t['name']} ({t['digest'][:12]})" for t in checkpoint["teachers"]),
        "initialised from": Path(config.get("init") or "").parent.name,
        "vocabulary": f"{model.config.vocab_size:,} pieces of {description}, "
        f"identity {checkpoint['tokenizer']['identity'][:12]}",
        "training text": config.get("train_shard", "")[:12],
        "cleaning": cleaning_of(config),
        "task": config.get("task"),
        "classes": ", ".join(config.get("classes", ())),
        "text": " and then ".join(map(str, config.get("form", ()))),
        "commit": checkpoint.get("commit"),
    }
    for name, title in PROGRESS.items():
        value = progress.get(name)
        facts[title] = f"{value:.4f}" if isinstance(value, float) else value and f"{value:,}"
    recipe = {name.replace("_", " "): config.get(name) for name in CARD_OPTIONS}
    if recipe["learning rate"] is not None:  # it was trained here
        recipe["dropout"] = getattr(model.config, "dropout", None)
        if config.get("epochs") and config.get("weight_decay"):
            decay = config["learning_rate"] * config["weight_decay"] * progress["step"] / config["epochs"]
            recipe["averaging time of the weights (epochs)"] = f"{1 / decay:.2g}"
    return {name: value for name, value in (facts | recipe).items() if value not in (None, "")}


def cleaning_of(config):
    """Returns how the training text was cleaned, or None if its file is no longer where it was."""
    try:
        shard = TokenShard(Path(str(config.get("data"))) / "train.bin")
    except (UserError, OSError):
        return None
    return shard.cleaning if shard.digest == config.get("train_shard") else None


def score_facts(path, digest):
    """Returns {fact: value} of the scores of the checkpoint with that digest in evaluate.py's JSON.

    Raises `UserError` if there are none.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["checkpoints"]
        (entry,) = [entry for entry in entries if entry.get("digest") == digest]
        facts = {name.replace("_", " "): f"{entry[name]:.4f}" for name in CARD_SCORES if entry.get(name)}
        for folder, pairs in (entry.get("pairs") or {}).items():
            facts[f"minimal pairs of {Path(folder).name}"] = f"{100 * pairs['accuracy_over_files']:.1f} %"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--scores {path}: no scores of this checkpoint: give what evaluate.py --json wrote for it"
        ) from error
    return facts


def card_notes(config, own, positions, start_token):
    """Returns paragraphs of the card. The model has `own` positions, the export `positions`."""
    notes, special = [], "Special tokens such as `<s>` never occurred in training. "
    if "train_shard" in config:
        notes.append(
            f"It has {positions} positions, and was trained on {config['sequence_length']} tokens at a time. "
            f"Change programs that ask for more."
        )
    if positions > own:
        notes.append(f"Beyond {own} positions nothing was trained.")
    if start_token == "newline":
        notes.append(
            f"{special}Their input embeddings are copies of the newline's (`--start-token newline`)."
        )
    elif "train_shard" in config:
        notes.append(f"{special}Their embeddings are as initialised: prefer a newline as context.")
    return notes


def model_card(checkpoint, model, folder, metadata, facts, notes):
    """Returns README.md. `metadata` is {"license", "language", "base_model"} as far as the user gave them."""
    is_text_generator = not is_classifier(checkpoint)
    kind = "CausalLM" if is_text_generator else "SequenceClassification"
    facts = card_facts(checkpoint, model) | facts
    card = CARD.format(
        task="text-generation" if is_text_generator else "text-classification",
        metadata="".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items() if value),
        name=plain(checkpoint["model"]["name"]),
        kind=kind,
        folder=folder,
        example=EXAMPLES[kind],
        facts="\n".join(f"| {name} | {plain(value)} |" for name, value in facts.items()),
    )
    return card + "".join(f"\n{note}\n" for note in notes)


# ---- export: the folder


def load_exportable(path):
    """Returns model, checkpoint and tokenizer. Raises `UserError` for what stock classes do not know."""
    model, checkpoint = load_any(path)
    architecture = checkpoint["model"]["architecture"]
    if architecture not in HF_FIELDS:
        raise UserError(
            f"{path} is a {architecture}, which Hugging Face's stock classes do not know: only "
            f"{' and '.join(HF_FIELDS)} can be exported"
        )
    if is_classifier(checkpoint) and SCORE not in checkpoint["weights"]:
        raise UserError(
            f"{path} has a head of several layers, which stock classes do not know: export what "
            "finetune.py --head linear makes"
        )
    tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
    check_tokenizer(tokenizer, path)
    return model, checkpoint, tokenizer


def start_like_newline(checkpoint, tokenizer, path):
    """Gives <s> and </s> the newline's input embedding. Raises `UserError` if the head is tied to it."""
    weights = checkpoint["weights"]
    if HEAD not in weights and not is_classifier(checkpoint):
        raise UserError(
            f"{path}: its head is its embedding, so that a row cannot be changed for the input alone: leave "
            "out --start-token"
        )
    (newline,) = tokenizer.encode("\n")
    rows = weights[EMBEDDING[checkpoint["model"]["architecture"]]]
    for special in (tokenizer.bos_id, tokenizer.eos_id):
        if special is not None:
            rows[special] = rows[newline]


def export(path, out, start_token="as-trained", positions=None, metadata=None, scores=None, dtype="fp32"):
    """Writes the checkpoint in `path` as the folder `out`; config.json, which loaders need, last.

    `positions` lets programs give a LLaMA longer texts than it was made for; `metadata` and the file
    `scores` are for the card; `dtype` is one of `DTYPES`. Raises `UserError` if the folder is not empty
    or something cannot be exported.
    """
    model, checkpoint, tokenizer = load_exportable(path)
    architecture, config = checkpoint["model"]["architecture"], checkpoint["config"]
    own = model.config.max_position_embeddings
    positions = positions or own
    if positions < own or (positions > own and architecture != "llama"):
        raise UserError(f"--positions {positions}: give {own} for {path}, or more if it is a LLaMA")
    if start_token == "newline":
        start_like_newline(checkpoint, tokenizer, path)
    save = import_extra("safetensors.torch").save
    # A classifier's texts are cut as in training.
    max_length = config["sequence_length"] if is_classifier(checkpoint) else positions
    as_published = "train_shard" not in config and not is_classifier(checkpoint)
    tokenizer_config, special_tokens_map = hf_tokenizer_config(tokenizer, max_length, as_published)
    special_ids = {key: i for key, i in special_ids_of(tokenizer).items() if key in SPECIAL_IDS}
    contents = {
        "generation_config.json": special_ids,
        "tokenizer.json": hf_tokenizer(tokenizer, as_published),
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special_tokens_map,
        "config.json": hf_config(model, architecture, config.get("classes", ()), special_ids, dtype)
        | {HF_FIELDS[architecture]["max_position_embeddings"]: positions},
    }
    facts = score_facts(scores, checkpoint["digest"]) if scores else {}
    if config.get("init_digest") and not (metadata or {}).get("base_model"):
        log(f"{path} was trained from another model: --base-model names it in the card")
    notes = card_notes(config, own, positions, start_token)
    card = model_card(checkpoint, model, out.name, metadata or {}, facts, notes)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another --out, or delete it")
    with atomic_write(out / "model.safetensors") as file:
        # transformers 4.51 insists on the format "pt".
        file.write(save(hf_weights(architecture, checkpoint["weights"], dtype), {"format": "pt"}))
    if not is_json(tokenizer):
        with atomic_write(out / "tokenizer.model") as file:
            file.write(tokenizer.model_bytes)
    write_text(out / "README.md", card)
    for name, content in contents.items():
        write_json(out / name, content)


# ---- import


def read_config(folder):
    """Returns architecture and our config of a folder's config.json; `UserError` for another model."""
    path = folder / "config.json"
    if not path.is_file():
        remedy = "give a folder that save_pretrained wrote"
        if not folder.exists():
            remedy = f"download the model first, such as: hf download {folder} --local-dir {folder.name}"
        raise UserError(f"{path} does not exist: {remedy}")
    try:
        theirs = json.loads(path.read_bytes())
        kind = theirs.get("model_type")  # custom code may have none
        if kind not in HF_FIELDS:
            raise UserError(f"{path}: model_type {kind!r}: only llama and gpt2 are read")
        check_rope(path, theirs)
        theirs = {HF_FIELDS[kind]["max_position_embeddings"]: DEFAULT_POSITIONS[kind]} | theirs
        fixed = dict(FIXED[kind])
        if kind == "llama":  # what is as usual is left out, as in our presets
            heads = theirs["num_attention_heads"]
            usual = {"num_key_value_heads": heads, "head_dim": theirs["hidden_size"] / heads}
            theirs |= {key: None for key, value in usual.items() if theirs.get(key) == value}
        else:
            theirs["n_inner"] = theirs.get("n_inner") or 4 * theirs["n_embd"]
            fixed |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), theirs.get("resid_pdrop", 0.1))
        for key, value in fixed.items():
            if theirs.get(key) not in (value, None):
                raise UserError(f"{path}: {key} is {theirs[key]!r}: only {value!r} is implemented")
        names = HF_FIELDS[kind].items()
        config = ARCHITECTURES[kind][1](**{n: theirs[t] for n, t in names if theirs.get(t) is not None})
        check_shape(config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError) as e:
        raise UserError(f"{path} does not describe a model: {type(e).__name__} {e}") from e
    return kind, config


def check_rope(path, theirs):
    """Moves `rope_theta` to the top level. Raises `UserError` for scaled positions."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = theirs.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{path}: rope scaling of type {kind!r} is not implemented")
        if "rope_theta" in rope:
            theirs["rope_theta"] = rope["rope_theta"]


def weight_files(folder):
    """Returns the files of a folder's weights: safetensors if there are any, else pytorch_model.bin."""
    patterns = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
    for pattern in patterns:
        if paths := sorted(folder.glob(pattern)):
            return paths
    raise UserError(f"{folder} has no model.safetensors and no pytorch_model.bin: download the whole model")


def read_tensors(path):
    """Returns {name: float32 tensor}. Raises `UserError` for a damaged file or another type.

    No code that a pickled file may hold is run.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = import_extra("safetensors.torch").load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        types = {name: tensor.dtype for name, tensor in tensors.items()}
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # both libraries raise errors of many types for bytes that they did not write
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged, or holds more than tensors: {reason}") from error
    for name, dtype in types.items():
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: {name!r} is {dtype}: only float32, float16 and bfloat16 are read")
    return {name: tensor.float() for name, tensor in tensors.items()}


def read_weights(folder, architecture, config):
    """Returns our state dict out of a folder's weights; `UserError` unless it is exactly this model's."""
    theirs = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            if not name.endswith(BUFFERS):
                theirs[name.removeprefix(PREFIXES[architecture])] = tensor
    if architecture == "llama":  # its tables of positions are no weights, and may be large
        config = dataclasses.replace(config, max_position_embeddings=1)
    with torch.device("meta"):
        expected = build(config).state_dict()
    weights = {}
    for name, ours in expected.items():
        if name not in theirs:
            raise UserError(f"{folder} lacks {hf_name(architecture, name)}")
        tensor = theirs.pop(name)
        if is_transposed(architecture, name) and tensor.dim() == 2:
            tensor = tensor.T.contiguous()
        if tensor.shape != ours.shape:
            shapes = tuple(tensor.shape), tuple(ours.shape)
            raise UserError(f"{folder}: {name} is {shapes[0]} where config.json implies {shapes[1]}")
        weights[name] = tensor
    head = theirs.pop(HEAD, None)
    if head is not None and not torch.equal(head, weights[EMBEDDING[architecture]]):
        raise UserError(f"{folder}: {HEAD} is a head of its own where config.json says it is tied")
    if theirs:
        raise UserError(f"{folder} holds what this architecture has not: {min(theirs)!r}")
    return weights


def import_folder(folder, out):
    """Writes a Hugging Face folder of a GPT-2 or LLaMA as a checkpoint of this project.

    Rows of embedding and head beyond the tokenizer's, with which others pad a vocabulary, are left out.
    Raises `UserError` for anything that our code would compute otherwise: another architecture or
    shape, scaled positions, a tokenizer of another kind.
    """
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    architecture, config = read_config(folder)
    tokenizer = folder_tokenizer(folder)
    size = tokenizer.vocabulary_size
    if size > config.vocab_size:
        raise UserError(f"{folder}: {size} pieces for {config.vocab_size} embeddings")
    weights = read_weights(folder, architecture, config)
    if size < config.vocab_size:
        log(f"{folder}: {config.vocab_size - size} rows beyond the tokenizer's {size} pieces are left out")
        config = dataclasses.replace(config, vocab_size=size)
        for name in {EMBEDDING[architecture], HEAD} & weights.keys():
            weights[name] = weights[name][:size].clone()
    write_checkpoint(
        out,
        model={
            "name": folder.resolve().name,
            "architecture": architecture,
            "shape": dataclasses.asdict(config),
        },
        weights=weights,
        config={"sequence_length": min(128, config.max_position_embeddings)},
        tokenizer=tokenizer,
        progress={},
    )
    try:
        load_checkpoint(out)
    except UserError as error:
        out.unlink()
        raise UserError(f"{folder} is no model that could be used: {error}") from error


def folder_tokenizer(folder):
    """Returns the tokenizer of a folder. Raises `UserError` if it has none that can be read."""
    for name in ("tokenizer.model", "tokenizer.json", "vocab.json"):
        if (path := folder / name).is_file():
            tokenizer = Tokenizer.load(path)
            check_tokenizer(tokenizer, path)
            if not is_json(tokenizer):
                check_pieces(folder, tokenizer)
            return tokenizer
    raise UserError(
        f"{folder} has no tokenizer.model, tokenizer.json or vocab.json: copy the tokenizer's files there"
    )


def check_pieces(folder, tokenizer):
    """Raises `UserError` if the folder's tokenizer.json has other pieces than `tokenizer`."""
    path = folder / "tokenizer.json"
    try:
        theirs = dict(json.loads(path.read_bytes())["model"]["vocab"])
    except FileNotFoundError:
        return
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: delete it if tokenizer.model is right") from error
    for i in range(tokenizer.vocabulary_size):
        if theirs.get(tokenizer.piece(i)) != i:
            raise UserError(
                f"{path} and tokenizer.model have different pieces: copy the right tokenizer.model"
            )


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "checkpoints", nargs="*", metavar="CHECKPOINT", help="several become folders of --out, by their names"
    )
    add("--import", dest="folder", metavar="DIR", help="import this Hugging Face folder instead")
    add("--out", required=True, metavar="PATH", help="folder, or with --import file, to write")
    help = "newline: give <s> and </s>, which training never saw, the newline's input embedding"
    add("--start-token", choices=("as-trained", "newline"), default="as-trained", help=help)
    help = "let programs give a LLaMA texts of this many tokens; those beyond its own were not trained"
    add("--positions", type=int, metavar="N", help=help)
    help = "type of the weights: bf16 halves the folder, and rounds them (default: fp32, as trained)"
    add("--dtype", choices=DTYPES, default="fp32", help=help)
    card = parser.add_argument_group("model card")
    card.add_argument("--license", metavar="ID", help="such as mit (default: none)")
    card.add_argument("--language", nargs="+", metavar="CODE", help="such as en or nl (default: none)")
    card.add_argument("--base-model", metavar="ID", help="the hub's name of the model it was trained from")
    card.add_argument("--scores", metavar="FILE", help="what evaluate.py --json wrote for the checkpoint")
    args = parser.parse_args(argv)
    if (not args.checkpoints) == (args.folder is None):
        parser.error("give either a CHECKPOINT to export or --import DIR")
    if args.positions is not None and not 0 < args.positions < 1 << 20:
        parser.error("--positions must be above 0, and below 1,048,576")
    of_exports = (args.positions, args.license, args.language, args.base_model, args.scores)
    if args.folder is not None and (
        (args.start_token, args.dtype) != ("as-trained", "fp32") or any(of_exports)
    ):
        parser.error("--import takes only --out: the other options are for exports")
    return args


def folder_names(paths):
    """Returns a name for each checkpoint: its file's, or where two files have one name, its run's."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else checkpoint_names(paths)


def main(argv=None):
    args = parse_arguments(argv)
    out, paths = Path(args.out), list(map(Path, args.checkpoints))
    if args.folder is not None:
        import_folder(Path(args.folder), out)
    folders = [out / name for name in folder_names(paths)] if len(paths) > 1 else [out]
    metadata = {"license": args.license, "language": args.language, "base_model": args.base_model}
    if len(paths) > 1:
        for path in paths:  # either all can be exported, or none is
            load_exportable(path)
    for path, folder in zip(paths, folders):
        export(path, folder, args.start_token, args.positions, metadata, args.scores, args.dtype)
    print(f"written: {', '.join(map(str, folders))}")


if __name__ == "__main__":
    sys.exit(run_program(main))
