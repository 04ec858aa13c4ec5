"""LLaMA (Touvron et al. 2023), the whole architecture: Baby Llama's other teacher, and its student.

RMSNorm before each sublayer (Zhang and Sennrich 2019), rotary positions (Su et al. 2021) by halves
as in Hugging Face's weights, SwiGLU (Shazeer 2020), no biases, and a head of its own. Published models
may have fewer keys and values than queries: each is read by a group of heads (Ainslie et al. 2023).
Attribute names are those of the reference state dict.

Dimensions: B sequences, T positions, C hidden, H heads, G groups of heads, D head size, I inner,
V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    num_key_value_heads: int | None = None  # G; None: one for each head
    head_dim: int | None = None  # D; None: hidden_size / heads
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches, as in GPT-2


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def head_size(config):
    """D, the size of a head."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def rope_tables(config):
    """cos and sin (positions, D) of position p times frequency theta^(-2i/D), the D/2 values twice."""
    D = head_size(config)
    # On the CPU, because `load_checkpoint` builds models on "meta" and loads only their parameters.
    frequencies = config.rope_theta ** -(torch.arange(0, D, 2, device="cpu").float() / D)  # (D/2,)
    positions = torch.arange(config.max_position_embeddings, device="cpu").float()
    angles = torch.outer(positions, frequencies).repeat(1, 2)  # (positions, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates each pair (x_i, x_{i+D/2}) by its position's angle: (B, H, T, D) → the same."""
    first, second = x.chunk(2, dim=-1)
    rotated = x * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated.to(x.dtype)


def joined_product(x, *projections):
    """x times each projection's matrix, as one product: (B, T, C) → one (B, T, out) for each."""
    weight = torch.cat([p.weight for p in projections])
    return F.linear(x, weight).split([p.out_features for p in projections], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D, H = config.hidden_size, head_size(config), config.num_attention_heads
        G = config.num_key_value_heads or H
        self.head_size = D
        self.is_grouped = G < H
        self.dropout = config.dropout
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, G * D, bias=False)
        self.v_proj = nn.Linear(C, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q, k, v = joined_product(x, self.q_proj, self.k_proj, self.v_proj)  # (B, T, H·D or G·D)
        q, k, v = (s.view(B, T, -1, self.head_size).transpose(1, 2) for s in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, D), (B, G, T, D)
        y = F.scaled_dot_product_attention(
            *(q, k, v),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.is_grouped,
        )
        y = self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = joined_product(x, self.gate_proj, self.up_proj)  # (B, T, I)
        x = self.down_proj(F.silu(gate) * up)  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self):
        for parameter in self.parameters():
            if parameter.dim() == 2:  # no scaling of residual projections, unlike GPT-2
                nn.init.normal_(parameter, std=self.config.initializer_range)

    @property
    def head(self):
        """The matrix (V, C) that maps hidden states to logits."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def blocks(self):
        """The list of identical layers."""
        return self.layers

    def hidden_states(self, tokens):
        """Final hidden states, after the last norm: (B, T) int64 → (B, T, C)."""
        T = tokens.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]  # (T, D)
        x = self.embed_tokens(tokens)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.layers:
            x = block(x, cos, sin)
        return self.norm(x)

    def forward(self, tokens):
        """Logits of the next token: (B, T) int64 → (B, T, V)."""
        return F.linear(self.hidden_states(tokens), self.head)
