"""The fused objective equals the plain formula, and the traps of research on fused losses."""

import pytest
import torch
from torch import nn

import loss as loss_module
from gpt2 import GPT2, GPT2Config
from loss import (
    Coefficients,
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


def assert_same_gradients(loss, expected, tensors, tolerance):
    """The largest difference, relative to the largest value."""
    gradients = torch.autograd.grad(loss, tensors)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, tensors)):
        assert (gradient - exact).abs().max() <= tolerance * exact.abs().max()


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
    assert_same_gradients(result["loss"], expected["loss"], (hidden, head), tolerance)


def test_fused_cross_entropy_equals_torch():
    hidden, head, _, targets = problem(torch.float64, 1)
    result = linear_cross_entropy(hidden, head, targets, B * T - 1, chunk_tokens=5)
    logits = (hidden @ head.T).flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    assert_same_gradients(result, expected, (hidden, head), 1e-10)


def test_mean_of_logits_is_the_geometric_mean_of_probabilities():
    logits = torch.randn(3, 5, V, dtype=torch.float64)
    ours = torch.softmax(ensemble_logits(list(logits), [1, 1, 1]), -1)
    product = torch.softmax(logits, -1).prod(0) ** (1 / 3)
    torch.testing.assert_close(ours, product / product.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [2, 3])
def test_distilling_from_a_perfect_copy_costs_nothing(dtype, copies):
    """In bfloat16 the sum of three logits is rounded once more than one of them: 2^-9 of a logit."""
    hidden, head, _, targets = problem(torch.float32, 1)
    teachers = [(hidden.detach(), head.detach(), 1.0)] * copies
    coefficients = COEFFICIENTS._replace(tau=3.0, alpha=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = fused(hidden, head, teachers, targets, coefficients)
    rounded = dtype == torch.bfloat16 and copies == 3  # not at a power of two
    assert result["kl"] / T < ((3 * 2**-9) ** 2 if rounded else 1e-7)


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_under_autocast_are_float32_and_near_float64(device):
    hidden, head, teachers, targets = problem(torch.float32, 2)
    hidden, head = (x.detach().to(device).requires_grad_() for x in (hidden, head))
    teachers, targets = [(h.to(device), w.to(device), k) for h, w, k in teachers], targets.to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = fused(hidden, head, teachers, targets)["loss"]
    doubles = [(h.double(), w.double(), k) for h, w, k in teachers]
    expected = plain(hidden.double(), head.double(), doubles, targets)["loss"]
    torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=0)
    result = torch.autograd.grad(loss, (hidden, head))
    for ours, exact in zip(result, torch.autograd.grad(expected, (hidden, head))):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() / exact.norm() < 0.02


@pytest.fixture
def rows_of(monkeypatch):
    """The arguments and results of each call of the function that computes the loss of some rows."""
    original, calls = loss_module._rows, []

    def spy(*arguments):
        result = original(*arguments)
        calls.append((arguments, result, original))
        return result

    monkeypatch.setattr(loss_module, "_rows", spy)
    return calls


def test_products_read_bfloat16_under_autocast_and_rows_do_not(rows_of):
    with torch.autocast("cpu", torch.bfloat16):
        fused(*problem(torch.float32, 2))
    [((logits, targets, teacher_logits, *rest), result, rows)] = rows_of
    assert logits.dtype == teacher_logits.dtype == torch.bfloat16
    exact = rows(logits.double(), targets, teacher_logits.double(), *rest)[-1]
    assert torch.equal(result[-1], exact.float().bfloat16())  # rounded once, at the very end


def test_no_gradient_is_computed_that_nobody_asked_for(rows_of):
    hidden, head, teachers, targets = problem(torch.float32, 1)
    with torch.no_grad():
        fused(hidden, head, teachers, targets)
    fused(hidden, head.detach(), teachers, targets)["loss"].backward()
    assert [arguments[-1] for arguments, *_ in rows_of] == [False, True]
    assert hidden.grad is not None and head.grad is None


def nearly_equal_models(N, C, distance):
    """Hidden states of a student and of its teacher, their head, targets, coefficients of the KL alone."""
    torch.manual_seed(0)
    teacher, head = torch.randn(N, C), torch.randn(V, C)
    student = (teacher + distance * torch.randn(N, C)).requires_grad_()
    coefficients = Coefficients(alpha=0.0, tau=2.0, num_targets=N, kl_denominator=N)
    return student, teacher, head, torch.randint(V, (N,)), coefficients


def rounded_logits(hidden, head):
    """Logits in float64 of the operands that a product in bfloat16 reads."""
    return (hidden.detach().bfloat16() @ (head - head.mean(0)).bfloat16().T).double()


def test_a_constant_added_to_all_logits_changes_nothing():
    student, teacher, head, targets, coefficients = nearly_equal_models(256, 16, 0.02)
    head = 0.3 * head
    ones = torch.ones(256, 1)
    student, teacher = torch.cat([ones, student], 1), torch.cat([ones, teacher], 1)

    def kl(offset):
        shifted = torch.cat([torch.full((V, 1), offset), head], 1)  # adds `offset` to every logit
        with torch.autocast("cpu", torch.bfloat16):
            result = fused(student, shifted, [(teacher, shifted, 1.0)], targets, coefficients)
        return result["kl"].item()

    for offset in (-60.0, -100.0):
        assert kl(offset) == pytest.approx(kl(0.0), rel=0.05)


def test_two_nearly_equal_models_have_the_gradient_of_float64():
    student, teacher, head, targets, coefficients = nearly_equal_models(64, 16, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(student, head, [(teacher, head, 1.0)], targets, coefficients)["loss"]
    (ours,) = torch.autograd.grad(loss, student)
    # The reference reads the same rounded operands and logits: what is tested is the subtraction.
    z, zt = rounded_logits(student, head), rounded_logits(teacher, head)
    dz = (torch.softmax(z / 2, -1) - torch.softmax(zt / 2, -1)) * 2 / 64
    exact = dz @ (head - head.mean(0)).bfloat16().double()
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
        result = fused(hidden, head, [(teacher, head, 1.0)], targets, coefficients)
    z, zt = rounded_logits(hidden, head), rounded_logits(teacher, head)
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
    assert_same_gradients(result["loss"], expected["loss"], model.wte.weight, 1e-10)


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


def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass():
    hidden, head, teachers, targets = problem(torch.float32, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused(hidden, head, teachers, targets)
    assert saved and max(saved) < B * T * V


def test_scaling_the_loss_afterwards_scales_the_gradient():
    hidden, head, teachers, targets = problem(torch.float64, 2)
    once, again = (fused(hidden, head, teachers, targets)["loss"] for _ in range(2))
    (gradient,) = torch.autograd.grad(once, hidden)
    (of_triple,) = torch.autograd.grad(3 * again, hidden)
    torch.testing.assert_close(3 * gradient, of_triple)


def test_unequal_micro_batches_add_up_to_the_whole():
    hidden, head, teachers, targets = problem(torch.float64, 2)
    full_batch = fused(hidden, head, teachers, targets)["loss"]
    parts = 0
    for rows in (slice(0, 1), slice(1, 3)):
        part_teachers = [(h[rows], w, k) for h, w, k in teachers]
        parts = parts + fused(hidden[rows], head, part_teachers, targets[rows])["loss"]
    torch.testing.assert_close(parts, full_batch)
    assert_same_gradients(parts, full_batch, head, 1e-7)
