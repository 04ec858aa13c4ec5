"""The objectives: the plain formulas first, then the fused one, which training uses.

    loss = alpha · CE + (1 - alpha) · tau² · KL( softmax(z_teachers / tau) ‖ softmax(z_student / tau) )

where z_teachers is the weighted mean of the teachers' *logits* (Timiryasov and Tastet 2023;
temperature tau and tau² from Hinton et al. 2015): the ensemble is the normalised geometric mean of
its members. CE is summed over targets and divided by `num_targets`. KL is summed over positions and
divided by `kl_denominator`: the sequences of the step as the original ran, or its tokens. Both are
counts of the whole step, so that micro-batches and ranks add up exactly. All losses are in nats.

Dimensions: N tokens, C hidden, V vocabulary, K teachers.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that has no loss: torch's own convention
REDUCTIONS = ("sequence", "token")
GPU_CHUNK_TOKENS = 4096  # few, large chunks keep a GPU busy
CPU_CHUNK_TOKENS = 512  # as fast on a CPU as 4096, with an eighth of the memory
BLOCK_ROWS = 32  # rows of 16,000 float32 logits are two megabytes: they fit a CPU core's L2 cache


class Coefficients(NamedTuple):
    """The numbers in the formula above; the two counts are those of the whole step."""

    alpha: float
    tau: float
    num_targets: int
    kl_denominator: float


def cross_entropy(logits, targets, num_targets):
    """Σ -log softmax(logits)[target] / num_targets: (..., V), (...) → ().

    Targets below 0 are ignored. If `num_targets` counts all other targets, the unit is nats per token.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()
    targets = targets.masked_fill(targets < 0, IGNORED)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / num_targets


def ensemble_logits(teacher_logits, weights):
    """The weighted mean of the teachers' logits: K × (..., V) → (..., V)."""
    return sum(w * z for w, z in zip(weights, teacher_logits)) / sum(weights)


def kl_divergence(p_logits, q_logits, tau, kl_denominator):
    """Σ_positions KL(p ‖ q) / kl_denominator, p and q at temperature tau: 2 × (..., V) → ().

    p is the distribution that q imitates: the teachers', in the paper.
    """
    log_p = F.log_softmax(p_logits / tau, dim=-1)
    log_q = F.log_softmax(q_logits / tau, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).sum() / kl_denominator


def mixed_loss(ce, kl, alpha, tau):
    """alpha · CE + (1 - alpha) · tau² · KL."""
    return alpha * ce + (1 - alpha) * tau**2 * kl


def plain_distillation_loss(student_logits, teacher_logits, weights, targets, coefficients):
    """The objective as the paper writes it, from logits: `distillation_loss` must equal it.

    student_logits (..., V), teacher_logits K × (..., V), weights K, targets (...). Returns a dict
    of `loss`, `cross_entropy` and `kl`, each ().
    """
    alpha, tau, num_targets, kl_denominator = coefficients
    ce = cross_entropy(student_logits, targets, num_targets)
    kl = kl_divergence(ensemble_logits(teacher_logits, weights), student_logits, tau, kl_denominator)
    return {"loss": mixed_loss(ce, kl, alpha, tau), "cross_entropy": ce, "kl": kl}


# ---- the fused objective
#
# A mean of logits is one linear map: mean_k(h_k W_kᵀ) = [h_1|…|h_K] · [W_1|…|W_K]ᵀ / K. So the
# ensemble costs one matrix product and no tensor per teacher. The gradient with respect to the
# student's logits z is known in closed form,
#
#     dz = alpha · (softmax(z) - onehot) / num_targets
#        + (1 - alpha) · tau · (softmax(z / tau) - softmax(z_teachers / tau)) / kl_denominator
#
# so the forward pass computes it, a chunk of tokens at a time, and keeps no logits.
# docs/method.md derives both.


def center_head(head):
    """`head` less its mean row: (V, C) → (V, C).

    This shifts all logits of a token by one constant. No softmax changes and, because each row of
    dz sums to zero, no gradient either. Without it, a large common offset would use up the digits
    of bfloat16.
    """
    return head - head.mean(dim=0, keepdim=True)


def join_heads(heads, weights, dtype):
    """The teachers' heads side by side, K × (V, C_k) → (V, ΣC_k), for one product of all.

    Each head is multiplied by its weight / mean weight, so equal weights leave the heads as they are.
    The division by K happens in the row arithmetic, where it is not rounded to `dtype`.
    """
    mean = sum(weights) / len(weights)
    scaled = [center_head(h) if w == mean else center_head(h) * (w / mean) for h, w in zip(heads, weights)]
    return torch.cat([h.to(dtype) for h in scaled], dim=1)


def matmul_dtype(tensor):
    """The dtype of matrix products with `tensor`: autocast's where it is on, else the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def distillation_loss(
    student_hidden,
    student_head,
    teachers,
    targets,
    coefficients,
    *,
    joined_head=None,
    chunk_tokens=None,
    compiled=False,
):
    """The distillation objective, fused: a dict of `loss`, `cross_entropy` and `kl`, each ().

    student_hidden (..., C), student_head (V, C), targets (...), and teachers
    [(hidden_k (..., C_k), head_k (V, C_k), weight_k), ...]. Heads are the float32 parameters and are
    cast inside. `joined_head` is `join_heads` of the teachers' heads, for callers that keep it from
    step to step. Logits of at most `chunk_tokens` tokens exist at a time. `compiled` runs the row
    arithmetic as one torch.compile'd kernel. Only `loss` has a gradient, only with respect to the
    student, and backward works only once.
    """
    dtype = matmul_dtype(student_hidden)
    hiddens, heads, weights = zip(*teachers)
    if joined_head is None:
        joined_head = join_heads([h.detach() for h in heads], weights, dtype)
    hidden = torch.cat([h.detach().to(dtype) for h in hiddens], dim=-1).flatten(0, -2)  # (N, ΣC_k)
    ensemble, gradient = (hidden, joined_head, len(teachers)), torch.is_grad_enabled()
    loss, ce, kl = _FusedLoss.apply(
        student_hidden, student_head, targets, ensemble, coefficients, chunk_tokens, compiled, gradient
    )
    return {"loss": loss, "cross_entropy": ce, "kl": kl}


def linear_cross_entropy(hidden, head, targets, num_targets, *, chunk_tokens=None, compiled=False):
    """`cross_entropy` of hidden states through a head, fused: (..., C), (V, C), (...) → ().

    This is `distillation_loss` without teachers; options and gradient are as there.
    """
    coefficients = Coefficients(alpha=1.0, tau=1.0, num_targets=num_targets, kl_denominator=1)
    gradient = torch.is_grad_enabled()
    return _FusedLoss.apply(hidden, head, targets, None, coefficients, chunk_tokens, compiled, gradient)[0]


class _FusedLoss(torch.autograd.Function):
    """Loss, cross-entropy and KL, each (). The ensemble is (hidden (N, ΣC_k), joined head, K) or None."""

    @staticmethod
    def forward(ctx, hidden, head, targets, ensemble, coefficients, chunk_tokens, compiled, gradient):
        shape, dtype = hidden.shape, matmul_dtype(hidden)
        hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
        on_cpu = hidden.device.type == "cpu"
        chunk_tokens = chunk_tokens or (CPU_CHUNK_TOKENS if on_cpu else GPU_CHUNK_TOKENS)
        row_function = _rows_in_blocks if on_cpu else _rows
        if compiled:
            row_function = _compiled_rows()
        # needs_input_grad is also True under no_grad, where no gradient is needed.
        needs_d_hidden, needs_d_head = (gradient and needed for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if needs_d_hidden else None
        d_head = torch.zeros_like(head) if needs_d_head else None
        need_gradient = needs_d_hidden or needs_d_head
        teacher_hidden, joined_head, num_teachers = ensemble or (None, None, 0)
        ce = kl = torch.zeros((), dtype=_row_dtype(dtype), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head_cast = center_head(head).to(dtype)  # (V, C)
            for start in range(0, len(hidden), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                hidden_cast = hidden[rows].to(dtype)  # (n, C)
                logits = hidden_cast @ head_cast.T  # (n, V)
                teacher_logits = None
                if ensemble:
                    teacher_logits = teacher_hidden[rows] @ joined_head.T  # (n, V): the sum of K teachers'
                chunk_ce, chunk_kl, dz = row_function(
                    logits, targets[rows], teacher_logits, num_teachers, coefficients, need_gradient
                )
                ce, kl = ce + chunk_ce, kl + chunk_kl
                if needs_d_hidden:
                    d_hidden[rows] = dz @ head_cast
                if needs_d_head:
                    d_head += _product_in_float32(dz.T, hidden_cast)
        ctx.save_for_backward(None if d_hidden is None else d_hidden.view(shape), d_head)
        ctx.mark_non_differentiable(ce, kl)
        return mixed_loss(ce, kl, coefficients.alpha, coefficients.tau), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _d_ce, _d_kl):
        # A device scalar times a tensor: the caller's scale costs no synchronisation.
        gradients = [None if d is None else d * d_loss.to(d.dtype) for d in ctx.saved_tensors]
        return (*gradients, *[None] * 6)


def _row_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_in_float32(a, b):
    """a @ b accumulated and returned in float32 where the device offers that for bfloat16."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _rows(logits, targets, teacher_logits, num_teachers, coefficients, need_gradient):
    """A chunk's Σ CE / num_targets and Σ KL / kl_denominator, and dz (n, V) or None.

    `teacher_logits` (n, V) is the sum over K teachers, or None, and then the KL is 0. The arithmetic
    is in float32 for logits of bfloat16 too; dz is rounded at the very end.
    """
    alpha, tau, num_targets, kl_denominator = coefficients
    num_targets = max(num_targets, 1)  # a step without targets: 0, not 0 / 0
    z = logits.to(_row_dtype(logits.dtype))
    if teacher_logits is None:
        log_sum = z.logsumexp(-1, keepdim=True)
        softmax = (z - log_sum).exp() if need_gradient else None
    else:
        log_q, q, log_sum, softmax = _softmaxes(z, tau)
    has_target = targets >= 0
    index = targets.clamp(min=0)[:, None]
    ce = ((log_sum - z.gather(1, index)).squeeze(1) * has_target).sum() / num_targets
    kl, dz = torch.zeros_like(ce), None
    if need_gradient:
        onehot = (torch.arange(z.shape[1], device=z.device) == index).to(z.dtype)
        dz = (softmax - onehot) * (has_target[:, None].to(z.dtype) * (alpha / num_targets))
    if teacher_logits is not None:
        log_p = F.log_softmax(teacher_logits.to(z.dtype) / (num_teachers * tau), dim=-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(-1).sum() / kl_denominator
        if need_gradient:
            dz = dz + (1 - alpha) * tau / kl_denominator * (q - p)
    return ce, kl, None if dz is None else dz.to(logits.dtype)


def _softmaxes(z, tau):
    """log softmax(z / tau), softmax(z / tau), log Σ exp(z) and softmax(z): (n, V) or (n, 1) each.

    exp(z) is exp(z / tau) to the power tau: at the paper's tau, 2, one exponential of each logit
    serves both softmaxes. The exponentials take most of the time here.
    """
    top = z.amax(-1, keepdim=True)
    shifted = (z - top) / tau
    exp_tau = shifted.exp()
    total = exp_tau.sum(-1, keepdim=True)
    q, log_q = exp_tau / total, shifted - total.log()
    if tau == 1:
        return log_q, q, top + total.log(), q
    exp = exp_tau.square() if tau == 2 else (z - top).exp()
    total = exp.sum(-1, keepdim=True)
    return log_q, q, top + total.log(), exp / total


def _rows_in_blocks(logits, targets, teacher_logits, num_teachers, coefficients, need_gradient):
    """`_rows` of BLOCK_ROWS rows at a time: eager row arithmetic on a CPU is bound by its cache."""
    ce = kl = 0
    dz = torch.empty_like(logits) if need_gradient else None
    for start in range(0, len(logits), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block_teacher = None if teacher_logits is None else teacher_logits[rows]
        block_ce, block_kl, block_dz = _rows(
            logits[rows], targets[rows], block_teacher, num_teachers, coefficients, need_gradient
        )
        ce, kl = ce + block_ce, kl + block_kl
        if need_gradient:
            dz[rows] = block_dz
    return ce, kl, dz


@functools.cache
def _compiled_rows():
    return torch.compile(_rows, dynamic=False)
