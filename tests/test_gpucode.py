"""The kernels that a GPU would run, checked without one: see `gpucode.py` for what is real in that.

Run them alone, in a process of their own: `python -m pytest -m gpucode`.
"""

import copy
import importlib.util
import itertools
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import loss
import model as models
from conftest import ROOT
from distill import cast_linears_to_bf16
from training.device import autocast_for, compile_blocks

LOCKED = re.search(r"^torch==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
pytestmark = [
    pytest.mark.gpucode,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason='needs triton: pip install ".[gpucode]" -c requirements.lock',
    ),
    pytest.mark.skipif(
        torch.__version__.partition("+")[0] != LOCKED,
        reason=f"knows the internals of torch {LOCKED}, here is {torch.__version__}",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, here is one: pytest -m gpu"),
]
B, T, C = 4, 32, 64
EXACT, BF16 = (autocast_for(torch.device("cpu"), precision) for precision in ("fp32", "bf16"))
OUTPUT_PROJECTIONS = {"gpt2": ("attn.c_proj", "mlp.c_proj"), "llama": ("self_attn.o_proj", "mlp.down_proj")}
# Kernels, products and attention of a layer: forward, backward, and of a frozen one.
LAUNCHES = {"gpt2": (17, 22, 9), "llama": (14, 19, 12)}
ROWS_LAUNCHES = 3
CAST = r"triton_poi_fused__to_copy(?:_cat|_t)*_\d+\.run\("  # a kernel that only casts weights
LAUNCH = r"\.run\(|extern_kernels\.\w+\(|_flash_attention(?:_backward)?\.default\("


@pytest.fixture(scope="module")
def on_an_h200():
    """The lists of `run_as_on_an_h200`."""
    if "triton" in sys.modules:
        pytest.skip("Triton is loaded already: run these tests alone, with -m gpucode")
    with pytest.MonkeyPatch.context() as patch, torch.compiler.config.patch(force_disable_caches=True):
        patch.setenv("TRITON_INTERPRET", "1")
        gpucode = importlib.import_module("gpucode")
        yield gpucode.run_as_on_an_h200(patch)


@pytest.fixture
def programs(on_an_h200):
    """What Inductor writes during a test."""
    on_an_h200[0].clear()
    return on_an_h200[0]


def count_launches(programs):
    """The launches of each program."""
    return [len(re.findall(LAUNCH, program)) for program in programs]


def one_layer(name, dropout=0.0):
    """A model of one layer, all of whose parameters matter."""
    torch.manual_seed(0)
    shape = {"hidden_size": C, "intermediate_size": 160, "num_hidden_layers": 1, "dropout": dropout}
    model = models.build_model(f"{name}-tiny", 300, **shape)
    for parameter in model.blocks[0].parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def compile_as_on_a_gpu(model):
    """`compile_blocks`, which must not take the model for one on the CPU."""
    parameter = torch.empty(0, device="meta")
    compile_blocks(types.SimpleNamespace(modules=lambda: [model], parameters=lambda: iter([parameter])))


def run_layer(model, precision):
    """The output (B, T, C) of the layer, and its input, after a seed."""
    torch.manual_seed(1)
    x = torch.randn(B, T, C, requires_grad=model.training)
    tables = (model.cos[:T], model.sin[:T]) if hasattr(model, "cos") else ()
    with precision:
        return model.blocks[0](x, *tables), x


def outcome(model, precision):
    """The output of the layer and all gradients: {name: tensor}."""
    parameters = dict(model.blocks[0].named_parameters())
    y, x = run_layer(model, precision)
    direction = torch.randn(B, T, C, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(y, [x, *parameters.values()], direction)
    return dict(zip(["output", "input", *parameters], [y.detach(), *gradients]))


def assert_exact_as_eager(exact, eager, compiled):
    """Asserts that the error of each tensor is at most 1.5 of the eager one, or float32's rounding."""
    for name, tensor in exact.items():
        allowed = 1.5 * (eager[name] - tensor).norm() + 1e-5 * tensor.norm()
        assert (compiled[name] - tensor).norm() <= allowed, name


@pytest.mark.parametrize("tau", [None, 1.0, 2.0, 1.7])
def test_rows_of_the_loss_are_exact(programs, tau):
    torch._dynamo.reset()
    torch.manual_seed(0)
    N, V = 16, 1300  # more columns than a kernel holds at a time
    logits, teacher_logits = (4 * torch.randn(2, N, V)).bfloat16()
    targets = torch.randint(V, (N,)).index_fill(0, torch.tensor([3]), loss.IGNORED)
    coefficients = loss.Coefficients(alpha=0.3, tau=tau or 1.0, num_targets=N - 1, kl_denominator=4)
    if tau is None:
        teacher_logits = None

    def rows(function, dtype):
        teachers = None if teacher_logits is None else teacher_logits.to(dtype)
        return function(logits.to(dtype), targets, teachers, 2, coefficients, True)

    ce, kl, dz = rows(loss._compiled_rows.__wrapped__(), torch.bfloat16)
    exact_ce, exact_kl, exact_dz = rows(loss._rows, torch.float64)
    assert ce.item() == pytest.approx(exact_ce.item(), rel=1e-6)
    assert kl.item() == pytest.approx(exact_kl.item(), rel=1e-6)
    torch.testing.assert_close(dz.double(), exact_dz, rtol=2**-8, atol=1e-6 * exact_dz.abs().max().item())
    assert "triton_red_fused" in programs[0]
    assert sum(count_launches(programs)) <= ROWS_LAUNCHES


@pytest.mark.parametrize(
    "precision, mix_order", [(EXACT, False), (BF16, False), (BF16, True)], ids=["fp32", "bf16", "mix_order"]
)
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_layer_agrees_with_an_eager_one(programs, name, precision, mix_order):
    """Also where one kernel sums over rows and over columns, as it does in the paper's teachers."""
    model = one_layer(name)
    exact, eager = outcome(model, EXACT), outcome(model, precision)
    compile_as_on_a_gpu(model)
    option = {"triton.mix_order_reduction_non_strict_mode": mix_order}  # else from 5,242,880 numbers on
    with torch._inductor.config.patch(option):
        assert_exact_as_eager(exact, eager, outcome(model, precision))
    assert ("RSPLIT_SIZE" in programs[1]) == mix_order
    forward, backward = count_launches(programs)
    assert forward <= LAUNCHES[name][0] and backward <= LAUNCHES[name][1]


@pytest.mark.parametrize("name", LAUNCHES)
def test_dropout_drops_its_share_and_the_same_numbers_backward(on_an_h200, monkeypatch, name):
    """A seed gives the same masks each time: two runs show them, and an eager layer repeats them."""
    _, contiguous = on_an_h200
    contiguous.clear()
    model, masks = one_layer(name, dropout=0.1), []
    block = model.blocks[0]
    eager_forward, eager_attention = block.forward, F.scaled_dot_product_attention
    compile_as_on_a_gpu(model)
    for other in reversed(OUTPUT_PROJECTIONS[name]):
        weights = copy.deepcopy(block.state_dict())
        with torch.no_grad():
            for parameter in block.get_submodule(other).parameters():
                parameter.zero_()  # so that the output shows what is dropped of this projection alone
            y, x = run_layer(model, BF16)
        block.load_state_dict(weights)
        masks.append(y != x)
        dropped = 1 - masks[-1].float().mean().item()
        assert dropped == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / y.numel()) ** 0.5)
    compiled = outcome(model, BF16)
    assert contiguous and all(contiguous)

    def attention(*qkv, dropout_p, **options):  # none is dropped in `gpucode.py` either
        return eager_attention(*qkv, **options)

    repeated = itertools.cycle(masks)
    monkeypatch.setattr(F, "dropout", lambda x, p, training: x * next(repeated) / (1 - p))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    block.forward = eager_forward
    assert_exact_as_eager(outcome(model, EXACT), outcome(model, BF16), compiled)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_frozen_layer_casts_nothing(programs, name):
    model = one_layer(name).requires_grad_(False).eval()
    outputs = []
    with torch.no_grad():
        exact, _ = run_layer(model, EXACT)
        eager, _ = run_layer(model, BF16)
        for prepare in (lambda model: None, cast_linears_to_bf16):
            prepare(model)
            compile_as_on_a_gpu(model)
            outputs.append(run_layer(model, BF16)[0])
    casts, no_casts = (re.findall(CAST, program) for program in programs)
    assert casts and not no_casts
    assert torch.equal(*outputs)
    assert_exact_as_eager({"output": exact}, {"output": eager}, {"output": outputs[0]})
    assert count_launches(programs)[1] <= LAUNCHES[name][2]
