"""The fused objective equals the plain formula, and the traps of research on fused losses."""

import pytest
import torch
from torch import nn

from gpt2 import GPT2, GPT2Config
from loss import (
    Coefficients,
    cross_entropy,
    distillation_loss,
    ensemble_logits,
    join_heads,
    kl_divergence,
    linear_cross_entropy,
    plain_distillation_loss,
)

B, T, C, V = 3, 7, 8, 29


def problem(dtype, num_teachers, scale=1.0):
    """Student hidden and head, teachers, targets (one ignored), all random."""
    torch.manual_seed(num_teachers)
    hidden = (scale * torch.randn(B, T, C, dtype=dtype)).requires_grad_()
    head = torch.randn(V, C, dtype=dtype).requires_grad_()
    teachers = [
        (torch.randn(B, T, C + k, dtype=dtype), torch.randn(V, C + k, dtype=dtype), 1.0 + 0.5 * k)
        for k in range(num_teachers)
    ]
    targets = torch.randint(V, (B, T))
    targets[0, 3] = -100
    return hidden, head, teachers, targets


COEFFICIENTS = Coefficients(alpha=0.3, tau=1.7, num_targets=B * T - 1, kl_denominator=B)


def plain(hidden, head, teachers, targets, coefficients=COEFFICIENTS):
    logits = [h @ w.T for h, w, _ in teachers]
    weights = [w for _, _, w in teachers]
    return plain_distillation_loss(hidden @ head.T, logits, weights, targets, coefficients)


def fused(hidden, head, teachers, targets, coefficients=COEFFICIENTS, **options):
    return distillation_loss(hidden, head, teachers, targets, coefficients, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_teachers, tau", [(1, 1.0), (2, 2.0), (3, 1.7), (2, 3.0)])
@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_fused_equals_plain_in_value_and_gradient(dtype, tolerance, num_teachers, tau, chunk_tokens):
    hidden, head, teachers, targets = problem(dtype, num_teachers)
    coefficients = COEFFICIENTS._replace(tau=tau)
    expected = plain(hidden, head, teachers, targets, coefficients)
    result = fused(hidden, head, teachers, targets, coefficients, chunk_tokens=chunk_tokens)
    for key in ("loss", "cross_entropy", "kl"):
        torch.testing.assert_close(result[key], expected[key], rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(result["loss"], (hidden, head))
    for gradient, exact in zip(gradients, torch.autograd.grad(expected["loss"], (hidden, head))):
        assert (gradient - exact).abs().max() <= tolerance * exact.abs().max()


def test_fused_cross_entropy_equals_torch():
    hidden, head, _, targets = problem(torch.float64, 1)
    result = linear_cross_entropy(hidden, head, targets, B * T - 1, chunk_tokens=5)
    logits = (hidden @ head.T).flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(result, (hidden, head))
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, (hidden, head))):
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)


def test_mean_of_logits_is_the_geometric_mean_of_probabilities():
    logits = torch.randn(3, 5, V, dtype=torch.float64)
    ours = torch.softmax(ensemble_logits(list(logits), [1, 1, 1]), -1)
    product = torch.softmax(logits, -1).prod(0) ** (1 / 3)
    torch.testing.assert_close(ours, product / product.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distilling_from_a_perfect_copy_costs_nothing(dtype):
    hidden, head, _, targets = problem(torch.float32, 1)
    teachers = [(hidden.detach(), head.detach(), 1.0)] * 3
    coefficients = COEFFICIENTS._replace(tau=3.0, alpha=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = fused(hidden, head, teachers, targets, coefficients)
    # In bfloat16 the sum of three logits is rounded once more than one of them: 2^-9 of a logit.
    bound = 1e-6 if dtype == torch.float32 else (3 * 2**-9) ** 2
    assert result["kl"] / T < bound
    # At a power of two even that vanishes.
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = fused(hidden, head, teachers[:2], targets, coefficients)
    assert result["kl"] / T < 1e-7


def test_tau_squared_keeps_the_scale_of_the_gradient():
    hidden, head, teachers, targets = problem(torch.float64, 2, scale=0.01)
    teachers = [(0.01 * h, w, k) for h, w, k in teachers]
    norms = []
    for tau in (10.0, 20.0):
        coefficients = COEFFICIENTS._replace(tau=tau, alpha=0.0)
        loss = fused(hidden, head, teachers, targets, coefficients)["loss"]
        norms.append(torch.autograd.grad(loss, hidden)[0].norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.02, atol=0)


def test_sequence_reduction_is_the_token_mean_times_the_length():
    logits, teacher = torch.randn(2, B, T, V)
    summed = kl_divergence(teacher, logits, 2.0, B)
    torch.testing.assert_close(summed, T * kl_divergence(teacher, logits, 2.0, B * T))
    reference = nn.KLDivLoss(reduction="batchmean")((logits / 2).log_softmax(-1), (teacher / 2).softmax(-1))
    torch.testing.assert_close(summed, reference)


def bfloat16_gradients(hidden, head, teachers, targets):
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(hidden, head, teachers, targets)["loss"]
    return torch.autograd.grad(loss, (hidden, head))


def test_gradients_under_autocast_are_float32_and_near_float64():
    hidden, head, teachers, targets = problem(torch.float32, 2)
    result = bfloat16_gradients(hidden, head, teachers, targets)
    doubles = [(h.double(), w.double(), k) for h, w, k in teachers]
    hidden64 = hidden.detach().double().requires_grad_()
    head64 = head.detach().double().requires_grad_()
    loss = plain(hidden64, head64, doubles, targets)["loss"]
    for ours, exact in zip(result, torch.autograd.grad(loss, (hidden64, head64))):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() / exact.norm() < 0.02


def test_products_read_bfloat16_under_autocast_and_rows_do_not(monkeypatch):
    import loss as module

    hidden, head, teachers, targets = problem(torch.float32, 2)
    seen = []
    rows = module._rows

    def spy(logits, targets, teacher_logits, *rest):
        seen.append((logits.dtype, teacher_logits.dtype))
        result = rows(logits, targets, teacher_logits, *rest)
        exact = rows(logits.double(), targets, teacher_logits.double(), *rest)[-1]
        seen.append(torch.equal(result[-1], exact.float().bfloat16()))
        return result

    monkeypatch.setattr(module, "_rows", spy)
    bfloat16_gradients(hidden, head, teachers, targets)
    assert seen == [(torch.bfloat16, torch.bfloat16), True]  # rounded once, at the very end


def test_a_constant_added_to_all_logits_changes_nothing():
    torch.manual_seed(0)
    C, N = 16, 256
    hidden = torch.randn(N, C)
    hidden[:, 0] = 1.0
    head = 0.3 * torch.randn(V, C)
    student = (hidden + 0.02 * torch.randn(N, C)).requires_grad_()
    targets = torch.randint(V, (N,))
    coefficients = Coefficients(alpha=0.0, tau=2.0, num_targets=N, kl_denominator=N)

    def kl(offset):
        shifted = head.clone()
        shifted[:, 0] += offset  # hidden[:, 0] is 1: adds `offset` to every logit
        with torch.autocast("cpu", torch.bfloat16):
            result = distillation_loss(student, shifted, [(hidden, shifted, 1.0)], targets, coefficients)
        return result["kl"].item()

    base = kl(0.0)
    for offset in (-60.0, -100.0):
        assert abs(kl(offset) - base) < 0.05 * base


def test_two_nearly_equal_models_have_the_gradient_of_float64():
    torch.manual_seed(0)
    N, C = 64, 16
    hidden, head = torch.randn(N, C), torch.randn(V, C)
    student = (hidden + 0.05 * torch.randn(N, C)).requires_grad_()
    targets = torch.randint(V, (N,))
    coefficients = Coefficients(alpha=0.0, tau=2.0, num_targets=N, kl_denominator=N)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(student, head, [(hidden, head, 1.0)], targets, coefficients)["loss"]
    (ours,) = torch.autograd.grad(loss, student)
    # The reference reads the same rounded operands and logits: what is tested is the subtraction.
    rounded = (head - head.mean(0)).bfloat16()
    z = (student.detach().bfloat16() @ rounded.T).double()
    zt = (hidden.bfloat16() @ rounded.T).double()
    dz = (torch.softmax(z / 2, -1) - torch.softmax(zt / 2, -1)) * 2 / N
    exact = dz @ rounded.double()
    assert (ours - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("magnitude", [1.0, 100.0, 1e4])
def test_logits_of_any_size_give_the_loss_of_float64_on_the_same_rounded_logits(magnitude):
    torch.manual_seed(0)
    N = 32
    hidden = (magnitude * torch.randn(N, C)).requires_grad_()
    head, teacher = torch.randn(V, C), magnitude * torch.randn(N, C)
    targets = torch.randint(V, (N,))
    coefficients = Coefficients(alpha=0.5, tau=2.0, num_targets=N, kl_denominator=N)
    with torch.autocast("cpu", torch.bfloat16):
        result = distillation_loss(hidden, head, [(teacher, head, 1.0)], targets, coefficients)
    rounded = (head - head.mean(0)).bfloat16()
    z = (hidden.detach().bfloat16() @ rounded.T).double()
    zt = (teacher.bfloat16() @ rounded.T).double()
    expected = plain_distillation_loss(z, [zt], [1.0], targets, coefficients)
    for key in ("loss", "cross_entropy", "kl"):
        torch.testing.assert_close(result[key].double(), expected[key], rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(result["loss"], hidden))


def test_equal_weights_leave_the_joined_heads_unscaled():
    heads = [torch.randn(V, C), torch.randn(V, C + 2)]
    joined = join_heads(heads, [2.0, 2.0], torch.float32)
    expected = torch.cat([h - h.mean(0) for h in heads], dim=1)
    assert torch.equal(joined, expected)


def test_a_tied_head_gets_its_gradient_from_both_uses():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(V, 8, 32, 1, 2, dropout=0.0)).double()
    tokens, targets = torch.randint(V, (2, B, T))
    teachers = [(torch.randn(B, T, C).double(), torch.randn(V, C).double(), 1.0)]
    result = fused(model.hidden_states(tokens), model.head, teachers, targets)
    expected = plain(model.hidden_states(tokens), model.head, teachers, targets)
    ours = torch.autograd.grad(result["loss"], model.wte.weight)[0]
    theirs = torch.autograd.grad(expected["loss"], model.wte.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_step_without_targets_has_no_cross_entropy_and_the_same_kl():
    hidden, head, teachers, targets = problem(torch.float64, 2)
    nothing = torch.full_like(targets, -100)
    result = fused(hidden, head, teachers, nothing, COEFFICIENTS._replace(num_targets=0))
    usual = fused(hidden, head, teachers, targets)
    assert result["cross_entropy"] == 0
    assert torch.equal(result["kl"], usual["kl"])
    assert torch.isfinite(result["loss"])


def test_a_second_backward_raises_rather_than_doubles():
    hidden, head, teachers, targets = problem(torch.float32, 1)
    loss = fused(hidden, head, teachers, targets)["loss"]
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_no_gradient_is_computed_that_nobody_asked_for(monkeypatch):
    import loss as module

    hidden, head, teachers, targets = problem(torch.float32, 1)
    need_gradient = []
    rows = module._rows
    monkeypatch.setattr(module, "_rows", lambda *a: need_gradient.append(a[-1]) or rows(*a))
    with torch.no_grad():
        fused(hidden, head, teachers, targets)
    assert need_gradient == [False]
    loss = fused(hidden, head.detach(), teachers, targets)["loss"]
    loss.backward()
    assert need_gradient == [False, True] and hidden.grad is not None and head.grad is None


def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass():
    hidden, head, teachers, targets = problem(torch.float32, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused(hidden, head, teachers, targets)
    assert saved and max(saved) < B * T * V


def test_scaling_the_loss_afterwards_scales_the_gradient():
    hidden, head, teachers, targets = problem(torch.float64, 2)
    loss = fused(hidden, head, teachers, targets)["loss"]
    (once,) = torch.autograd.grad(loss, hidden)
    loss = fused(hidden, head, teachers, targets)["loss"]
    (thrice,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(3 * once, thrice)


def test_unequal_micro_batches_add_up_to_the_whole():
    hidden, head, teachers, targets = problem(torch.float64, 2)
    full_batch = fused(hidden, head, teachers, targets)["loss"]
    parts = 0
    for rows in (slice(0, 1), slice(1, 3)):
        part_teachers = [(h[rows], w, k) for h, w, k in teachers]
        parts = parts + fused(hidden[rows], head, part_teachers, targets[rows])["loss"]
    torch.testing.assert_close(parts, full_batch)
    ours = torch.autograd.grad(parts, head)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(full_batch, head)[0])


def test_targets_that_are_ignored_do_not_count():
    logits = torch.randn(4, V)
    targets = torch.tensor([1, -100, 2, -100])
    saved = targets != -100
    expected = cross_entropy(logits[saved], targets[saved], 2)
    torch.testing.assert_close(cross_entropy(logits, targets, 2), expected)


@pytest.mark.gpu
def test_fused_equals_plain_on_a_gpu():
    hidden, head, teachers, targets = problem(torch.float32, 2)
    expected = plain(hidden, head, teachers, targets)
    theirs = torch.autograd.grad(expected["loss"], (hidden, head))
    hidden, head = (x.detach().cuda().requires_grad_() for x in (hidden, head))
    teachers = [(h.cuda(), w.cuda(), k) for h, w, k in teachers]
    with torch.autocast("cuda", torch.bfloat16):
        result = fused(hidden, head, teachers, targets.cuda())
    torch.testing.assert_close(result["loss"].cpu(), expected["loss"], rtol=0.02, atol=0)
    for ours, exact in zip(torch.autograd.grad(result["loss"], (hidden, head)), theirs):
        assert ours.dtype == torch.float32
        assert (ours.cpu() - exact).norm() / exact.norm() < 0.02
