"""Takes a checkpoint to Hugging Face's stock classes, and one of theirs back.

    python export_hf.py runs/distilled-llama-58m/best.pt --out babyllama-58m
    python export_hf.py runs/distilled-llama-58m/chck_*.pt --out marks         a folder for each
    python export_hf.py runs/finetune/llama-58m/rte/seed-0/best.pt --out rte   a classifier
    python export_hf.py --import babyllama-58m --out babyllama-58m.pt

The folder loads with `AutoModelForCausalLM` (what finetune.py trained with
`AutoModelForSequenceClassification`) and `AutoTokenizer`, under transformers 4.51 and 5.x
alike, without trust_remote_code: config.json has the keys of both generations. The tokenizer is
written as tokenizer.json, because LlamaTokenizer splits text otherwise than SentencePiece does
where there is no dummy prefix. What is imported can be scored by evaluate.py, trained further
(train.py --init), and can teach students whose data has the same tokenizer.
"""

import argparse
import dataclasses
import html
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from finetuning.classifier import is_classifier, load_any
from model import ARCHITECTURES, build, check_shape, count_parameters
from tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from training.checkpoint import write_checkpoint
from training.io import (
    UserError,
    atomic_write,
    json_memory,
    printable,
    run_program,
    write_json,
    write_text,
)

# Fields of our configs under Hugging Face's names.
FIELDS = {
    "llama": {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "initializer_range": "initializer_range",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    "gpt2": {
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "dropout": "resid_pdrop",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
    },
}
# What our forward passes compute; a config that says otherwise is of another model.
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
CLASSIFIERS = {
    "llama": "LlamaForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}
PREFIXES = {"llama": "model.", "gpt2": "transformer."}
HEAD, SCORE = "lm_head.weight", "score.weight"  # the parameters outside the prefix
EMBEDDING = {"llama": "embed_tokens.weight", "gpt2": "wte.weight"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D keeps (in, out)
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # in old files, and constant
CONTEXT_IF_UNSAID = {"llama": 2048, "gpt2": 1024}  # where a config.json leaves out the default

METRICS = ("accuracy", "f1", "mcc")  # of a classifier on its valid examples
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = 1 << 21  # some 15,000 tensors; the format's own limit is 100 MB
SPECIAL = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
# Text that a lossy tokenizer would change: runs of blanks, a tab, a ligature, a no-break space.
PROBE = "a  b\n\n\tﬁ ½\u00a0e\u0301 "


# ---- safetensors: a header of JSON, then the bytes (huggingface.co/docs/safetensors)


def write_safetensors(path, tensors):
    """Writes {name: float32 tensor} atomically."""
    header, stop = {"__metadata__": {"format": "pt"}}, 0  # transformers 4.51 insists on "pt"
    for name, tensor in tensors.items():
        start, stop = stop, stop + 4 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.float().contiguous().numpy())


def read_safetensors(path):
    """{name: float32 tensor}. Raises `UserError` unless every byte of the file is accounted for."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        start = 8 + header_bytes
        if not 0 < header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path} is damaged: a header of {header_bytes} bytes is impossible")
        try:
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            entries = [
                (entry["data_offsets"], entry["dtype"], entry["shape"], name)
                for name, entry in header.items()
            ]
            valid = all(type(shape) is list and type(dtype) is str for _, dtype, shape, _ in entries)
            numbers = [n for offsets, _, shape, _ in entries for n in (*offsets, *shape)]
            valid = valid and all(type(n) is int and 0 <= n <= size for n in numbers)
            entries.sort(key=lambda entry: entry[0])
            bounds = [0, *(stop for (_, stop), *_ in entries)]
            valid = valid and bounds[:-1] == [begin for (begin, _), *_ in entries]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: its header cannot be read") from error
    if not valid or start + bounds[-1] != size:
        raise UserError(f"{path} is damaged: its header contradicts its {size} bytes")
    tensors, payload = {}, np.memmap(path, np.uint8, mode="r")[start:]
    for (begin, stop), dtype, shape, name in entries:
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name!r} is {dtype!r}: only F32, F16 and BF16 are read")
        kind = SAFETENSORS_DTYPES[dtype]
        if math.prod(shape) * kind.itemsize != stop - begin:
            raise UserError(f"{path} is damaged: {name!r} has not the bytes of its shape")
        tensor = torch.empty((stop - begin) // kind.itemsize, dtype=kind)
        tensor.view(torch.uint8).numpy()[:] = payload[begin:stop]
        try:
            tensors[name] = tensor.view(shape).float()
        except RuntimeError as error:  # no elements in dimensions beyond all bounds
            raise UserError(f"{path} is damaged: {name!r} has an impossible shape") from error
    return tensors


# ---- export


def hf_name(architecture, name):
    """The name of a parameter in the reference's state dict."""
    return name if name in (HEAD, SCORE) else PREFIXES[architecture] + name


def is_transposed(architecture, name):
    """Whether the reference keeps this matrix as (in, out)."""
    return architecture == "gpt2" and name.endswith(TRANSPOSED)


def hf_weights(architecture, weights):
    """A state dict of ours as the reference's: other names, Conv1D's matrices transposed."""
    return {
        hf_name(architecture, name): w.T if is_transposed(architecture, name) else w
        for name, w in weights.items()
    }


def check_tokenizer(tokenizer, path):
    """Raises `UserError` for a tokenizer that tokenizer.json could not log, or that loses text.

    Of a BPE model the scores are 0, -1, -2, ... in the order of merging; a unigram's, or those of
    user-defined pieces, are others.
    """
    processor, size = tokenizer.processor, tokenizer.vocabulary_size
    special = [processor.is_control(i) for i in (PAD, BOS, EOS)] + [processor.is_unknown(UNK)]
    scores = [processor.get_score(i) for i in range(size) if is_normal(processor, i)]
    lines = tokenizer.encode("a\n") + tokenizer.encode("b")
    if (
        not all(special)
        or scores != [-float(i) for i in range(len(scores))]
        or tokenizer.decode(tokenizer.encode(PROBE)) != PROBE
        or tokenizer.encode("a\nb") != lines
        or tokenizer.encode("\n") != [processor.piece_to_id("<0x0A>")]
    ):
        raise UserError(
            f"{path}: a tokenizer of another kind than tokenize_corpus.py's (BPE with byte "
            "fallback that changes no text and adds no prefix; ids 0 to 3 for pad, bos, eos, unk)"
        )


def is_normal(processor, i):
    """Whether a piece is text: no control piece, byte, unknown or unused one."""
    kinds = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    return not any(kind(i) for kind in kinds)


def hf_config(model, architecture, classes=()):
    """config.json, with the keys of transformers 4 and 5 where they differ.

    `classes` are the names of a classifier's.
    """
    shape = dataclasses.asdict(model.config)
    config = {"architectures": [CLASSES[architecture]], "model_type": architecture}
    config |= {theirs: shape[ours] for ours, theirs in FIELDS[architecture].items()}
    config |= FIXED[architecture] | SPECIAL_IDS
    if architecture == "llama":
        head_size = shape["hidden_size"] // shape["num_attention_heads"]
        config |= {"num_key_value_heads": shape["num_attention_heads"], "head_dim": head_size}
        rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
        config |= {"rope_scaling": None, "rope_parameters": rope}
    else:
        config |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), shape["dropout"])
    if classes:
        config["architectures"] = [CLASSIFIERS[architecture]]
        config |= {
            "id2label": {str(i): name for i, name in enumerate(classes)},
            "label2id": {name: i for i, name in enumerate(classes)},
            "problem_type": "single_label_classification",
        }
    return config | {"torch_dtype": "float32", "dtype": "float32", "use_cache": True}


def hf_tokenizer(tokenizer):
    """tokenizer.json: the same BPE for the `tokenizers` library.

    Pieces are numbered in the order in which SentencePiece merges, so a merge's rank is the number
    of its result; each way to split a piece into two others is a merge of that rank.
    """
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(i) for i in range(tokenizer.vocabulary_size)]
    (newline,) = tokenizer.encode("\n")
    ids = {piece: i for i, piece in enumerate(pieces)}
    normal = {piece for i, piece in enumerate(pieces) if is_normal(processor, i)}
    splits = [
        (ids[piece], ids[piece[:i]], ids[piece[i:]])
        for piece in normal
        for i in range(1, len(piece))
        if piece[:i] in normal and piece[i:] in normal
    ]
    added = [
        {
            "id": i,
            "content": pieces[i],
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i in sorted(SPECIAL.values())
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        # One text is what it is; a second one begins on a line of its own, as in training.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "newline", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"newline": {"id": "newline", "ids": [newline], "tokens": [pieces[newline]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[UNK],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [[pieces[left], pieces[right]] for _, left, right in sorted(splits)],
        },
    }


def hf_tokenizer_config(tokenizer, context):
    """tokenizer_config.json, and special_tokens_map.json, which only transformers 4 reads."""
    special = {key: tokenizer.processor.id_to_piece(i) for key, i in SPECIAL.items()}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without this 4.51 adds token_type_ids, which GPT-2 turns into embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    return config, special


def plain(value):
    """A value as text that is no markup, on one line, in Markdown and in a table of it."""
    return html.escape(printable(str(value))).replace("|", "\\|")


def hub_metadata(checkpoint):
    """The lines of YAML with which a card begins: what the Hugging Face hub shows and searches."""
    loss = checkpoint["progress"].get("dev_cross_entropy")
    kind = "text-classification" if is_classifier(checkpoint) else "text-generation"
    lines = ["library_name: transformers", f"pipeline_tag: {kind}", "license: mit"]
    lines += ["language: en", "tags: [babylm, baby-llama]"]
    if kind == "text-generation" and loss is not None and math.isfinite(loss):
        lines += [
            "model-index:",
            f"- name: {json.dumps(plain(checkpoint['model']['name']))}",
            "  results:",
            "  - task: {type: text-generation}",
            "    dataset: {name: dev text of its training, type: text}",
            f"    metrics: [{{type: cross-entropy, name: nats per token, value: {loss:.4f}}}]",
        ]
    return ["---", *lines, "---"]


def classifier_facts(config, progress):
    """What the card of a classifier says besides, or, where it is None, leaves out."""
    return {
        "task": config.get("task"),
        "classes": ", ".join(config["classes"]),
        "text": " and then ".join(map(str, config.get("form") or [])),
        **{key: progress.get(key) and f"{progress[key]:.4f}" for key in METRICS},
        **dict.fromkeys(("init", "words seen")),
    }


def model_card(checkpoint, model, start_token, positions):
    """README.md: what the checkpoint itself knows of its origin. `positions` are the export's."""
    config, progress = checkpoint["config"], checkpoint["progress"]
    texts = is_classifier(checkpoint)
    facts = {
        "model": f"{checkpoint['model']['name']}, {count_parameters(model):,} parameters",
        "teachers": ", ".join(f"{t['name']} ({t['digest'][:12]})" for t in checkpoint["teachers"]),
        "tokenizer": f"SentencePiece BPE, identity {checkpoint['tokenizer']['identity'][:12]}",
        "data": config.get("train_shard") and f"training shard {config['train_shard'][:12]}",
        "words seen": progress.get("words") and f"{progress['words']:,}",
        "steps": progress.get("step") and f"{progress['step']:,} of {progress.get('steps', 0):,}",
        "last dev cross-entropy": progress.get("dev_cross_entropy")
        and f"{progress['dev_cross_entropy']:.4f} nats per {'text' if texts else 'token'}",
        "commit": checkpoint.get("commit"),
    }
    facts |= classifier_facts(config, progress) if texts else {}
    recipe = (
        "learning_rate",
        "batch_size",
        "sequence_length",
        "epochs",
        "warmup_steps",
        "weight_decay",
        "random_offset",
        "alpha",
        "temperature",
        "kl_reduction",
        "teacher_weights",
        "init",
        "seed",
    )
    facts |= {key.replace("_", " "): config.get(key) for key in recipe if key not in facts}
    start = (
        "`<s>` and `</s>` never occurred in training. "
        + {
            "as-trained": "Their embeddings are as initialised: prefer a newline as context.",
            "newline": "In this export their input embeddings are copies of the newline's, the "
            "context in which sentences begin in training (`--start-token newline`).",
        }[start_token]
    )
    seen = config.get("sequence_length", positions)
    limit = (
        f"It has {positions} positions, and was trained on {seen} tokens at a time. Give programs "
        f"that ask for 512 by default `--sequence_length {positions}`."
    )
    title = checkpoint["model"]["name"]
    if texts:
        title += f", fine-tuned on {config.get('task')}"
    own = model.config.max_position_embeddings
    if positions > own:
        limit += f" Beyond {own} positions nothing was trained."
    lines = [
        *hub_metadata(checkpoint),
        "",
        f"# {plain(title)}",
        "",
        "Written by a reimplementation of [Baby Llama](https://arxiv.org/abs/2308.02019).",
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {k} | {plain(v)} |" for k, v in facts.items() if v not in (None, "")),
        "",
        *([limit, ""] if "train_shard" in config else []),
        *([start, ""] if "train_shard" in config or start_token == "newline" else []),
    ]
    return "\n".join(lines)


def export(path, out, start_token="as-trained", positions=None):
    """Writes the checkpoint in `path` as the folder `out`; config.json, which loaders need, last.

    `positions` lets programs give a LLaMA longer texts than it was made for. Raises `UserError` if
    the folder is not empty, the model's head is tied and `start_token` asks for other input rows,
    or a GPT-2 is asked for positions that it has no embeddings for.
    """
    model, checkpoint = load_any(path)
    architecture, classes = checkpoint["model"]["architecture"], ()
    if architecture not in FIELDS:
        raise UserError(
            f"{path} is a {architecture}, which Hugging Face's stock classes do not know: only "
            f"{' and '.join(FIELDS)} can be exported"
        )
    tokenizer = Tokenizer.of_checkpoint(checkpoint, path)
    check_tokenizer(tokenizer, path)
    weights = checkpoint["weights"]
    if is_classifier(checkpoint):
        classes = checkpoint["config"]["classes"]
        if SCORE not in weights:
            raise UserError(
                f"{path} has a head of several layers, which stock classes do not know: export "
                "what finetune.py --head linear makes"
            )
    if start_token == "newline":
        if HEAD not in weights and not classes:
            raise UserError(
                f"{path}: its head is its embedding, so that a row cannot be changed for the "
                "input alone: leave out --start-token"
            )
        (newline,) = tokenizer.encode("\n")
        rows = weights[EMBEDDING[architecture]]
        rows[[BOS, EOS]] = rows[newline].clone()
    context = positions or model.config.max_position_embeddings
    read = checkpoint["config"]["sequence_length"] if classes else context  # longer texts are cut
    own = model.config.max_position_embeddings
    if positions and positions < own:
        raise UserError(f"--positions {positions}: {path} has {own}: give at least that many")
    if positions and positions > own and architecture != "llama":
        raise UserError(
            f"--positions {positions}: {path} is a {architecture} of {own}: only a LLaMA can have more"
        )
    tokenizer_config, special_tokens_map = hf_tokenizer_config(tokenizer, read)
    contents = {
        "generation_config.json": SPECIAL_IDS,
        "tokenizer.json": hf_tokenizer(tokenizer),
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special_tokens_map,
        "config.json": hf_config(model, architecture, classes)
        | {FIELDS[architecture]["max_position_embeddings"]: context},
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another --out, or delete it")
    write_safetensors(out / "model.safetensors", hf_weights(architecture, weights))
    with atomic_write(out / "tokenizer.model") as file:
        file.write(tokenizer.model_bytes)
    write_text(out / "README.md", model_card(checkpoint, model, start_token, context))
    for name, content in contents.items():
        write_json(out / name, content)


# ---- import


def read_config(folder):
    """Architecture and our config of a folder's config.json; `UserError` if it is another model."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a folder that save_pretrained wrote")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise UserError(f"{path} is too large for a config: give what save_pretrained wrote")
    try:
        theirs = json.loads(path.read_bytes())
        kind = theirs["model_type"]
        if kind not in FIELDS:
            raise UserError(f"{path}: model_type {kind!r}: only llama and gpt2 are read")
        check_rope(path, theirs)
        theirs = {FIELDS[kind]["max_position_embeddings"]: CONTEXT_IF_UNSAID[kind]} | theirs
        fixed = dict(FIXED[kind])
        if kind == "llama":
            heads = theirs["num_attention_heads"]
            fixed |= {"num_key_value_heads": heads, "head_dim": theirs["hidden_size"] // heads}
        else:
            theirs["n_inner"] = theirs.get("n_inner") or 4 * theirs["n_embd"]
            fixed |= dict.fromkeys(("embd_pdrop", "attn_pdrop"), theirs.get("resid_pdrop", 0.1))
        for key, value in fixed.items():
            if theirs.get(key) not in (value, None):
                raise UserError(f"{path}: {key} is {theirs[key]!r}: only {value!r} is implemented")
        names = FIELDS[kind].items()
        shape = {ours: theirs[name] for ours, name in names if theirs.get(name) is not None}
        config = ARCHITECTURES[kind][1](**shape)
        check_shape(config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError) as e:
        raise UserError(f"{path} does not describe a model: {type(e).__name__} {e}") from e
    return kind, config


def check_rope(path, theirs):
    """Puts `rope_theta` at the top level; `UserError` for positions that are scaled."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = theirs.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{path}: rope scaling of type {kind!r} is not implemented")
        if "rope_theta" in rope:
            theirs["rope_theta"] = rope["rope_theta"]


def read_weights(folder, architecture, expected):
    """Our state dict out of model.safetensors; `UserError` unless it is exactly this model's."""
    path = folder / "model.safetensors"
    if not path.is_file():
        sharded = (folder / "model.safetensors.index.json").exists()
        remedy = "save it again with save_pretrained(..., max_shard_size='100GB')"
        why = "the weights are in several files" if sharded else f"{path} does not exist"
        raise UserError(f"{why}: {remedy}")
    theirs = {}
    for name, tensor in read_safetensors(path).items():
        bare = name.removeprefix(PREFIXES[architecture])
        if bare in theirs:
            raise UserError(f"{path} holds {bare!r} twice, with and without a prefix")
        if not name.endswith(BUFFERS):
            theirs[bare] = tensor
    weights = {}
    for name, ours in expected.items():
        if name not in theirs:
            raise UserError(f"{path} lacks {hf_name(architecture, name)}")
        tensor = theirs.pop(name)
        if is_transposed(architecture, name) and tensor.dim() == 2:
            tensor = tensor.T.contiguous()
        if tensor.shape != ours.shape:
            expected, found = tuple(ours.shape), tuple(tensor.shape)
            raise UserError(f"{path}: {name} is {found} where config.json implies {expected}")
        weights[name] = tensor
    head = theirs.pop(HEAD, None)
    if head is not None and not torch.equal(head, weights[EMBEDDING[architecture]]):
        raise UserError(f"{path}: {HEAD} is a head of its own where config.json says it is tied")
    if theirs:
        raise UserError(f"{path} holds what this architecture has not: {min(theirs)!r}")
    return weights


def import_folder(folder, out):
    """Writes a Hugging Face folder of a GPT-2 or LLaMA as a checkpoint of this project.

    Raises `UserError` for anything that our code would compute otherwise: another architecture or
    shape, scaled positions, a tokenizer that is not a lossless SentencePiece model.
    """
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    architecture, config = read_config(folder)
    if not (folder / "tokenizer.model").is_file():
        raise UserError(
            f"{folder} has no tokenizer.model: only SentencePiece tokenizers are read; "
            "save_pretrained leaves the file out, so copy it from where the folder was made from"
        )
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    check_tokenizer(tokenizer, folder / "tokenizer.model")
    if tokenizer.vocabulary_size > config.vocab_size:
        raise UserError(f"{folder}: {tokenizer.vocabulary_size} pieces for {config.vocab_size} embeddings")
    check_pieces(folder, tokenizer)
    with torch.device("meta"):
        expected = build(config).state_dict()
    weights = read_weights(folder, architecture, expected)
    shape = dataclasses.asdict(config)
    write_checkpoint(
        out,
        model={"name": folder.resolve().name, "architecture": architecture, "shape": shape},
        weights=weights,
        config={"sequence_length": min(128, config.max_position_embeddings)},
        tokenizer=tokenizer,
        progress={},
    )


def check_pieces(folder, tokenizer):
    """Raises `UserError` where the folder's tokenizer.json has other pieces than `tokenizer`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    content = path.read_bytes()
    try:
        if json_memory(content) > (64 << 20) + 6 * len(content):
            raise ValueError("it is no tokenizer")
        vocabulary = json.loads(content)["model"]["vocab"]
        ids = {tokenizer.processor.id_to_piece(i): i for i in range(tokenizer.vocabulary_size)}
        same = not isinstance(vocabulary, dict) or ids.items() <= vocabulary.items()
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: delete it if tokenizer.model is right") from error
    if not same:
        raise UserError(
            f"{folder}: tokenizer.model and tokenizer.json have different pieces: copy the "
            "tokenizer.model with which the folder was made"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="what to export; several become folders of --out, by their names",
    )
    parser.add_argument("--import", dest="folder", metavar="DIR", help="what to import instead")
    parser.add_argument("--out", required=True, metavar="PATH", help="folder or file to write")
    parser.add_argument(
        "--start-token",
        choices=("as-trained", "newline"),
        default="as-trained",
        help="newline: give <s> and </s>, which training never saw, the newline's input embedding "
        "(default: as-trained)",
    )
    parser.add_argument(
        "--positions",
        type=int,
        metavar="N",
        help="for a LLaMA: how long a text the folder's readers may give it, for programs that ask "
        "for more than it was trained on; what lies beyond is untrained",
    )
    args = parser.parse_args(argv)
    if (not args.checkpoints) == (args.folder is None):
        parser.error("give either a CHECKPOINT to export or --import DIR")
    if args.positions is not None and not 0 < args.positions < 1 << 20:
        parser.error("--positions must be above 0, and below 1,048,576")
    out, several = Path(args.out), len(args.checkpoints) > 1
    if args.folder is not None:
        if args.start_token != "as-trained" or args.positions:
            parser.error("--start-token and --positions are for exports")
        import_folder(Path(args.folder), out)
    elif len({Path(path).stem for path in args.checkpoints}) < len(args.checkpoints):
        parser.error("two checkpoints have one name: export them apart")
    if several:  # all of them can be read, or none is written
        for path in args.checkpoints:
            load_any(path)
    for path in map(Path, args.checkpoints):
        export(path, out / path.stem if several else out, args.start_token, args.positions)
    folders = [out / Path(path).stem for path in args.checkpoints] if several else [out]
    print(f"written: {', '.join(map(str, folders))}")


if __name__ == "__main__":
    sys.exit(run_program(main))
