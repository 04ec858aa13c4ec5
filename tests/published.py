"""Folders of the forms in which models are published, small and with random weights."""

import io
import json

import sentencepiece
import tokenizers
import torch
import transformers

from conftest import write_text

byte_level = tokenizers.pre_tokenizers.ByteLevel
NASTY = ["the old dog", " leading", "trailing ", "two  blanks   three", "\ttab\tand\nline\r\nend", "\n\n\n"]
NASTY += [" ", "", "naïve café e\u0301", "emoji 👩‍👩‍👧 🇫🇷", "\u2028 and \u2029 and \u0085", "nul\x00byte"]
NASTY += ["\u00a0no-break\u200b", "ﬁ ½ ①", "مرحبا بالعالم", "日本語", "x" * 3000, "dog" * 500]
NASTY += ["<0x0A> and ▂", "\ufeffbom", 'don\'t -- "stop"...', "we'll see 1984 of 3.14", "a\n\nb\n \nc"]
TEXT = write_text(2000, seed=1).split("\n")


# ---- models


LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
SMOLLM2 = {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-5}


def random_model(config, dtype=torch.float32):
    """Transformers' model of that config, in which no weight is 0."""
    torch.manual_seed(0)
    kind = config.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **config)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def save_model(folder, tokenizer, config, dtype=torch.float32, pickled=False, **options):
    """Writes a model with the tokenizer of that name into a folder; `options` are of save_pretrained."""
    special_ids = TOKENIZERS[tokenizer](folder)
    model = random_model(config | special_ids, dtype)
    model.save_pretrained(folder, **options)
    if pickled:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


# ---- tokenizers: each writes its files, and returns what config.json says of it


def train(tokenizer, special, size=400):
    """Trains a byte-level BPE."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator([*TEXT, *NASTY, "\n\n\n"], trainer)
    return tokenizer


def write_json(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def baby_llama(folder):
    """Byte level after NFKC, with a blank before each text; saved by transformers' class."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=True)
    train(tokenizer, ["<pad>", "<s>", "</s>"])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return {"vocab_size": 400}


def baby_llama_2(folder):
    """With the token for unknown pieces that transformers' GPT2TokenizerFast adds beyond the rows."""
    config = baby_llama(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return config


def gpt2_tokenizer():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    return train(tokenizer, ["<|endoftext|>"])


def gpt2(folder):
    folder.mkdir(exist_ok=True)
    gpt2_tokenizer().save(str(folder / "tokenizer.json"))
    return {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0}


def gpt2_vocabulary(folder):
    """vocab.json and merges.txt alone."""
    folder.mkdir(exist_ok=True)
    gpt2_tokenizer().model.save(str(folder))
    return {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0}


def smollm2(folder):
    """Byte level with single digits."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level(add_prefix_space=False)])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    train(tokenizer, special)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), special[0])
    write_json(folder, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"} | names)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0}


def llama2(folder):
    """SentencePiece with a blank before each text, and without a padding piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False} | names
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}


def llama2_json(folder):
    """The same as transformers writes it: tokenizer.json alone."""
    special_ids = llama2(folder)
    write_json(folder, "config.json", {"model_type": "llama"})
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return special_ids


TOKENIZERS = {
    "Baby Llama": baby_llama,
    "Baby Llama 2": baby_llama_2,
    "GPT-2": gpt2,
    "GPT-2's vocabulary": gpt2_vocabulary,
    "SmolLM2": smollm2,
    "Llama 2": llama2,
    "Llama 2's tokenizer.json": llama2_json,
}
# {form: arguments of save_model}
FORMS = {
    "Baby Llama": {"tokenizer": "Baby Llama", "config": LLAMA | {"rms_norm_eps": 1e-6}, "pickled": True},
    "Baby Llama 2": {"tokenizer": "Baby Llama 2", "config": LLAMA | {"tie_word_embeddings": True}},
    "Baby Llama's teacher": {"tokenizer": "Baby Llama", "config": GPT2, "pickled": True},
    "BabyLM's GPT-2": {"tokenizer": "GPT-2", "config": GPT2},
    "distilgpt2": {"tokenizer": "GPT-2's vocabulary", "config": GPT2 | {"n_inner": 80}},
    "SmolLM2": {"tokenizer": "SmolLM2", "config": LLAMA | SMOLLM2, "dtype": torch.bfloat16},
    "TinyLlama": {
        "tokenizer": "Llama 2",
        "config": LLAMA | {"num_key_value_heads": 1},
        "dtype": torch.float16,
    },
    "Llama 2": {"tokenizer": "Llama 2's tokenizer.json", "config": LLAMA, "max_shard_size": "40KB"},
    "heads of another size": {
        "tokenizer": "GPT-2",
        "config": LLAMA | {"head_dim": 6, "num_key_value_heads": 2},
    },
    "a GPT-2 in several files": {
        "tokenizer": "GPT-2",
        "config": GPT2,
        "dtype": torch.float16,
        "max_shard_size": "40KB",
    },
}
