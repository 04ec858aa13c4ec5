"""GPT-2 (Radford et al. 2019), the whole architecture: the first of Baby Llama's two teachers.

Learned positions, LayerNorm before each sublayer, one joined projection for queries, keys and
values, GELU in its tanh form, biases everywhere, and a head that is the token embedding itself.
Attribute names are those of the reference state dict; weights are stored (out, in).

Dimensions: B sequences, T positions, C hidden, H heads, D head size, I inner, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPT2Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 256
    dropout: float = 0.1  # on embeddings, attention weights and both residual branches
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.num_heads, -1).unbind(2)  # (B, T, H, D)
        q, k, v = (s.transpose(1, 2) for s in (q, k, v))  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, I)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self._initialise()

    def _initialise(self):
        std = self.config.initializer_range
        # Each layer adds two outputs of a c_proj to the residual stream: its variance stays about 1.
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scaled = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=residual_std if scaled else std)

    @property
    def head(self):
        """The matrix (V, C) that maps hidden states to logits; tied to the token embedding."""
        return self.wte.weight

    @property
    def blocks(self):
        """The list of identical layers."""
        return self.h

    def hidden_states(self, tokens):
        """Final hidden states, after the last norm: (B, T) int64 → (B, T, C)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, tokens):
        """Logits of the next token: (B, T) int64 → (B, T, V)."""
        return F.linear(self.hidden_states(tokens), self.head)
