"""The objectives: the plain formulas first, then the fused one that is trained with.

    loss = alpha · CE + (1 - alpha) · T² · KL( softmax(z_teachers / T) ‖ softmax(z_student / T) )

where z_teachers is the weighted mean of the teachers' *logits* (Timiryasov and Tastet 2023;
temperature and T² from Hinton et al. 2015): the ensemble is the normalised geometric mean of its
members. CE is summed over targets and divided by `num_targets`. The KL is summed over positions and
divided by `kl_denominator`: the sequences of the step as the original ran, or its tokens. Both are
counts of the whole step, so that micro-batches and ranks add up exactly. All losses are in nats.

Dimensions: N tokens, C hidden, V vocabulary, K teachers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that has no loss: torch's own convention
REDUCTIONS = ("sequence", "token")
BLOCK_ROWS = 32  # rows of 16,000 float32 logits are two megabytes: a processor's cache


def cross_entropy(logits, targets, num_targets):
    """Σ -log softmax(logits)[target] / num_targets: (..., V), (...) → ().

    Targets below 0 count nothing. In nats per token where `num_targets` is the number of others.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()
    targets = targets.masked_fill(targets < 0, IGNORED)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / num_targets


def smoothed_cross_entropy(logits, targets, num_targets, label_smoothing):
    """Cross-entropy against (1 - ε) of the target and ε spread evenly over the vocabulary.

    (Szegedy et al. 2016.) Same shapes as `cross_entropy`, which this is at ε = 0.
    """
    if not label_smoothing:
        return cross_entropy(logits, targets, num_targets)
    spread = -F.log_softmax(logits, dim=-1).mean(-1)
    spread = (spread * (targets >= 0)).sum() / num_targets
    ce = cross_entropy(logits, targets, num_targets)
    return (1 - label_smoothing) * ce + label_smoothing * spread


def ensemble_logits(teacher_logits, weights):
    """The weighted mean of the teachers' logits: K × (..., V) → (..., V)."""
    return sum(w * z for w, z in zip(weights, teacher_logits)) / sum(weights)


def kl_divergence(student_logits, teacher_logits, temperature, kl_denominator, kl_mask=None):
    """Σ_positions KL(teacher ‖ student) at a temperature, / kl_denominator: 2 × (..., V) → ().

    `kl_mask` (...) leaves positions out: it is the KL's own, independent of ignored targets.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    per_position = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    if kl_mask is not None:
        per_position = per_position * kl_mask
    return per_position.sum() / kl_denominator


def mixed_loss(ce, kl, alpha, temperature):
    """alpha · CE + (1 - alpha) · T² · KL."""
    return alpha * ce + (1 - alpha) * temperature**2 * kl


def plain_distillation_loss(
    student_logits,
    teacher_logits,
    weights,
    targets,
    *,
    alpha,
    temperature,
    num_targets,
    kl_denominator,
    kl_mask=None,
    label_smoothing=0.0,
):
    """The objective as the paper writes it, from logits: what `distillation_loss` must equal.

    student_logits (..., V), teacher_logits K × (..., V), weights K, targets (...). A dict of
    `loss`, `cross_entropy` and `kl`, each ().
    """
    ce = cross_entropy(student_logits, targets, num_targets)
    teacher = ensemble_logits(teacher_logits, weights)
    kl = kl_divergence(student_logits, teacher, temperature, kl_denominator, kl_mask)
    smoothed = smoothed_cross_entropy(student_logits, targets, num_targets, label_smoothing)
    return {"loss": mixed_loss(smoothed, kl, alpha, temperature), "cross_entropy": ce, "kl": kl}


# ---- the fused objective
#
# A mean of logits is one linear map: mean_k(h_k W_kᵀ) = [h_1|…|h_K] · [W_1|…|W_K]ᵀ / K. So the
# ensemble costs one matrix product and no tensor per teacher. The gradient with respect to the
# student's logits z is known in closed form,
#
#     dz = alpha · (softmax(z) - onehot) / num_targets
#        + (1 - alpha) · T · (softmax(z / T) - softmax(z_teachers / T)) / kl_denominator
#
# so it is computed in the forward pass, a chunk of tokens at a time, and no logits are kept.


def center_head(head):
    """`head` less its mean row: (V, C) → (V, C).

    This adds one constant to all logits of a token, which changes no softmax and, the rows of dz
    summing to zero, no gradient; but a large common offset would use up the digits of bfloat16.
    """
    return head - head.mean(dim=0, keepdim=True)


def join_heads(heads, weights, dtype):
    """The teachers' heads side by side, K × (V, C_k) → (V, ΣC_k), for one product of all.

    Weights are folded in relative to their mean, so that equal weights leave the heads as they are;
    the division by K happens in the row arithmetic, where it is not rounded to `dtype`.
    """
    mean = sum(weights) / len(weights)
    scaled = [center_head(h) if w == mean else center_head(h) * (w / mean) for h, w in zip(heads, weights)]
    return torch.cat([h.to(dtype) for h in scaled], dim=1)


def matmul_dtype(tensor):
    """The type that matrix products read here: autocast's where it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def distillation_loss(
    student_hidden,
    student_head,
    teachers,
    targets,
    *,
    alpha,
    temperature,
    num_targets,
    kl_denominator,
    kl_mask=None,
    label_smoothing=0.0,
    joined_head=None,
    chunk_tokens=None,
    compiled=False,
):
    """The distillation objective, fused: a dict of `loss`, `cross_entropy` and `kl`, each ().

    student_hidden (..., C), student_head (V, C), targets (...), and teachers
    [(hidden_k (..., C_k), head_k (V, C_k), weight_k), ...]. Heads are the float32 parameters; they
    are cast for the product inside. `joined_head` is `join_heads` of the teachers' heads, for
    callers who keep it. At most `chunk_tokens` tokens have logits at a time; `compiled` passes over
    them once. Only `loss` has a gradient, with respect to the student alone, and only once.
    """
    dtype = matmul_dtype(student_hidden)
    joined = Teachers.join(teachers, dtype, joined_head, kl_mask)
    constants = Constants(alpha, temperature, len(teachers), num_targets, kl_denominator, label_smoothing)
    loss, ce, kl = _fused(student_hidden, student_head, targets, joined, constants, chunk_tokens, compiled)
    return {"loss": loss, "cross_entropy": ce, "kl": kl}


def linear_cross_entropy(
    hidden, head, targets, num_targets, label_smoothing=0.0, chunk_tokens=None, compiled=False
):
    """`smoothed_cross_entropy` and `cross_entropy`, fused, of hidden states through a head.

    (..., C), (V, C) → (), (). No logits are kept. Only the first has a gradient.
    """
    constants = Constants(1.0, 1.0, 0, num_targets, 1, label_smoothing)
    return _fused(hidden, head, targets, None, constants, chunk_tokens, compiled)[:2]


@dataclass(frozen=True)
class Constants:
    """The constants of one step's objective; without teachers there is no KL."""

    alpha: float
    temperature: float
    num_teachers: int
    num_targets: int
    kl_denominator: float
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Teachers:
    """The ensemble as one linear map: hidden (N, ΣC_k), head (V, ΣC_k), the KL's mask (N,) or None.

    Its logits are K times the ensemble's; the rows divide by K, where nothing is rounded.
    """

    hidden: torch.Tensor
    head: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def join(cls, teachers, dtype, joined_head, kl_mask):
        """The record of [(hidden_k, head_k, weight_k), ...] for products in `dtype`."""
        hiddens, heads, weights = zip(*teachers)
        if joined_head is None:
            joined_head = join_heads([h.detach() for h in heads], weights, dtype)
        hidden = torch.cat([h.detach().to(dtype) for h in hiddens], dim=-1).flatten(0, -2)
        return cls(hidden, joined_head, None if kl_mask is None else kl_mask.flatten())

    def rows(self, rows):
        """Logits (n, V) and mask (n,) or None of a slice of the tokens."""
        return self.hidden[rows] @ self.head.T, None if self.mask is None else self.mask[rows]


@dataclass(frozen=True)
class Chunking:
    """How the tokens are passed over: so many at a time, products in `dtype`, by which function."""

    chunk_tokens: int
    dtype: torch.dtype
    gradients_wanted: bool
    row_function: Callable

    def chunks(self, num_tokens):
        """The slices of the tokens, in order."""
        return [slice(i, i + self.chunk_tokens) for i in range(0, num_tokens, self.chunk_tokens)]


def _fused(hidden, head, targets, teachers, constants, chunk_tokens, compiled):
    if chunk_tokens is None:
        # Few, large chunks keep a GPU busy; a CPU is as fast with smaller ones, in less memory.
        chunk_tokens = 4096 if hidden.is_cuda else 512
    row_function = _row_function(hidden.is_cuda, compiled)
    gradients = torch.is_grad_enabled()
    chunking = Chunking(chunk_tokens, matmul_dtype(hidden), gradients, row_function)
    with torch.autocast(hidden.device.type, enabled=False):
        return _FusedLoss.apply(hidden.flatten(0, -2), head, targets.flatten(), teachers, constants, chunking)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, teachers, constants, chunking):
        wanted = [chunking.gradients_wanted and needed for needed in ctx.needs_input_grad[:2]]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_head = torch.zeros_like(head) if wanted[1] else None
        head_cast = center_head(head).to(chunking.dtype)  # (V, C)
        zero = torch.zeros((), dtype=_row_dtype(chunking.dtype), device=hidden.device)
        smoothed = ce = kl = zero
        for rows in chunking.chunks(len(hidden)):
            hidden_cast = hidden[rows].to(chunking.dtype)  # (N, C)
            logits = hidden_cast @ head_cast.T  # (N, V)
            taught = (None, None) if teachers is None else teachers.rows(rows)
            *sums, dz = chunking.row_function(logits, targets[rows], *taught, constants, any(wanted))
            smoothed, ce, kl = smoothed + sums[0], ce + sums[1], kl + sums[2]
            if wanted[0]:
                d_hidden[rows] = dz @ head_cast
            if wanted[1]:
                d_head += _product_in_float32(dz.T, hidden_cast)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(ce, kl)
        return mixed_loss(smoothed, kl, constants.alpha, constants.temperature), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _d_ce, _d_kl):
        # A device scalar times a tensor: the caller's scale costs no synchronisation.
        gradients = [None if d is None else d * d_loss.to(d.dtype) for d in ctx.saved_tensors]
        return (*gradients, *[None] * 4)


def _row_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_in_float32(a, b):
    """a @ b accumulated and returned in float32 where the device offers that for bfloat16."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _rows(logits, targets, teacher_logits, kl_mask, constants, want_gradient):
    """One chunk's smoothed CE and CE / num_targets, Σ KL / kl_denominator, and dz (N, V) or None.

    Row arithmetic is in float32 whatever the logits are in; dz is rounded at the very end.
    """
    z = logits.to(_row_dtype(logits.dtype))
    T = constants.temperature
    if teacher_logits is None:
        log_sum = z.logsumexp(-1, keepdim=True)
        p = (z - log_sum).exp() if want_gradient else None
    else:
        log_q, q, log_sum, p = _softmaxes(z, T)  # q at the temperature, p = exp(z - log_sum) at 1
    valid = targets >= 0
    index = targets.clamp(min=0)[:, None]
    num_targets = max(constants.num_targets, 1)  # no target at all: 0, not 0 / 0
    ce = smoothed = ((log_sum - z.gather(1, index)).squeeze(1) * valid).sum() / num_targets
    epsilon = constants.label_smoothing
    if epsilon:
        spread = ((log_sum.squeeze(1) - z.mean(-1)) * valid).sum() / num_targets
        smoothed = (1 - epsilon) * ce + epsilon * spread
    dz = None
    if want_gradient:
        wanted = (torch.arange(z.shape[1], device=z.device) == index).to(z.dtype)
        if epsilon:
            wanted = (1 - epsilon) * wanted + epsilon / z.shape[1]
        weight = valid[:, None].to(z.dtype) * (constants.alpha / num_targets)
        dz = (p - wanted) * weight
    if teacher_logits is None:
        return smoothed, ce, torch.zeros_like(ce), None if dz is None else dz.to(logits.dtype)
    log_teacher = F.log_softmax(teacher_logits.to(z.dtype) / (constants.num_teachers * T), dim=-1)
    p_teacher = log_teacher.exp()
    per_row = (p_teacher * (log_teacher - log_q)).sum(-1)
    weight = (1 - constants.alpha) * T / constants.kl_denominator
    if kl_mask is not None:
        per_row = per_row * kl_mask
        weight = weight * kl_mask[:, None].to(z.dtype)
    kl = per_row.sum() / constants.kl_denominator
    if want_gradient:
        dz = (dz + weight * (q - p_teacher)).to(logits.dtype)
    return smoothed, ce, kl, dz


def _softmaxes(z, temperature):
    """log softmax(z / T), softmax(z / T), log Σ exp(z) and softmax(z): (n, V) or (n, 1) each.

    exp(z) is the T-th power of exp(z / T): at the paper's temperature, 2, one exponential of each
    logit serves both softmaxes. Exponentials are what takes the time here.
    """
    top = z.amax(-1, keepdim=True)
    shifted = (z - top) / temperature
    at_temperature = shifted.exp()
    total = at_temperature.sum(-1, keepdim=True)
    q, log_q = at_temperature / total, shifted - total.log()
    if temperature == 1:
        return log_q, q, top + total.log(), q
    powers = at_temperature.square() if temperature == 2 else (z - top).exp()
    total = powers.sum(-1, keepdim=True)
    return log_q, q, top + total.log(), powers / total


def _rows_in_blocks(logits, targets, teacher_logits, kl_mask, constants, want_gradient):
    """`_rows`, a few rows at a time: what a processor's cache holds, it passes over cheaply."""
    sums = 0, 0, 0
    dz = torch.empty_like(logits) if want_gradient else None
    for start in range(0, len(logits), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        parts = [None if x is None else x[rows] for x in (targets, teacher_logits, kl_mask)]
        *block, block_dz = _rows(logits[rows], *parts, constants, want_gradient)
        sums = [total + part for total, part in zip(sums, block)]
        if want_gradient:
            dz[rows] = block_dz
    return *sums, dz


@functools.cache
def _compiled_rows():
    return torch.compile(_rows, dynamic=False)


def _row_function(on_gpu, compiled):
    if compiled:
        return _compiled_rows()
    return _rows if on_gpu else _rows_in_blocks
