"""A language model with a classification head: what `finetune.py` trains, and its checkpoints.

The head reads the final hidden state of a text's last token, as transformers'
`LlamaForSequenceClassification` and `GPT2ForSequenceClassification` do. It is the model's attribute
`score`; the head for tokens is left out where it is not the embedding as well.
"""

import torch
from torch import nn

import model as models
from llama import LlamaConfig
from training.io import UserError

HEADS = ("linear", "mlp")
MLP_DROPOUT = 0.1  # as in BabyLM's pipeline of 2025


def make_head(kind, config, num_classes):
    """Returns the head: hidden states (B, C) → logits (B, classes).

    "linear" is one matrix without a bias, initialised like the model's, as in transformers; "mlp" is that
    of BabyLM's pipeline of 2025: norm, linear, GELU, norm, dropout, linear.
    """
    size = config.hidden_size
    if kind == "linear":
        head = nn.Linear(size, num_classes, bias=False)
        nn.init.normal_(head.weight, std=config.initializer_range)
        return head
    return nn.Sequential(
        nn.LayerNorm(size, elementwise_affine=False),
        nn.Linear(size, size),
        nn.GELU(),
        nn.LayerNorm(size, elementwise_affine=False),
        nn.Dropout(MLP_DROPOUT),
        nn.Linear(size, num_classes),
    )


def class_logits(model, tokens, last):
    """Returns logits of the classes: tokens (B, T), positions of last tokens (B,) → (B, classes)."""
    hidden = model.hidden_states(tokens)  # (B, T, C)
    return model.score(hidden[torch.arange(len(last), device=last.device), last]).float()


def as_classifier(model, num_classes, head="linear", dropout=None):
    """Returns a copy of a language model with a new head, drawn from torch's global generator.

    A `dropout` of None is that of the exported model in training: a GPT-2's own, none in a LLaMA.
    """
    changes = {}
    if isinstance(model.config, LlamaConfig):
        changes = {"dropout": 0.0, "tie_word_embeddings": True}  # "tied": no head for tokens is made
    if dropout is not None:
        changes["dropout"] = dropout
    config = models.with_overrides(model.config, changes)
    copy = models.build(config)
    weights = model.state_dict()
    copy.load_state_dict({name: weights[name] for name in copy.state_dict()})
    copy.score = make_head(head, config, num_classes)
    return copy


def is_classifier(checkpoint):
    """True if a checkpoint is a classifier's: its config names "classes"."""
    return "classes" in checkpoint["config"]


def load_any(path):
    """Returns model and checkpoint of a language model or a classifier, as `model.load_checkpoint`."""

    def add_head(model, config):
        classes, head = config.get("classes"), config.get("head")
        if classes is None:
            return
        if not classes or {type(c) for c in classes} != {str} or head not in HEADS:
            raise ValueError("its head is unknown")
        model.score = make_head(head, model.config, len(classes))

    return models.load_checkpoint(path, add_head)


def load_classifier(path):
    """Returns `load_any` of a classifier. Raises `UserError` for a language model."""
    model, checkpoint = load_any(path)
    if not is_classifier(checkpoint):
        raise UserError(f"{path} is a language model: finetune.py makes a classifier of it")
    return model, checkpoint
