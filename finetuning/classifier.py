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
    """The head from hidden states (B, C) to logits (B, classes).

    "linear" is one matrix, without a bias and drawn like the model's, as in transformers; "mlp"
    that of BabyLM's pipeline of 2025: norm, linear, GELU, norm, dropout, linear.
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
    """Logits of the classes, (B, T) int64 and the places (B,) of last tokens → (B, classes)."""
    hidden = model.hidden_states(tokens)  # (B, T, C)
    return model.score(hidden[torch.arange(len(last), device=last.device), last]).float()


def as_classifier(model, num_classes, head="linear", dropout=None):
    """A copy of a language model with a new head, drawn from torch's global generator.

    With `dropout` None it is what the exported model would be trained with: a GPT-2 with its own, a
    LLaMA with none.
    """
    changes = {}
    if isinstance(model.config, LlamaConfig):
        changes = {"dropout": 0.0, "tie_word_embeddings": True}  # it has no head of its own
    changes |= {} if dropout is None else {"dropout": dropout}
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
    """`model.load_checkpoint` of a language model or a classifier."""

    def add_head(model, config):
        classes, head = config.get("classes"), config.get("head")
        if classes is None:
            return
        if not classes or {type(c) for c in classes} != {str} or head not in HEADS:
            raise ValueError("its head is unknown")
        model.score = make_head(head, model.config, len(classes))

    return models.load_checkpoint(path, add_head)


def load_classifier(path):
    """`load_any`, but `UserError` for a language model."""
    model, checkpoint = load_any(path)
    if not is_classifier(checkpoint):
        raise UserError(f"{path} is a language model: finetune.py makes a classifier of it")
    return model, checkpoint
