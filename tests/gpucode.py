"""Inductor's code for an H200, made without a GPU and executed in Triton's interpreter.

Real: the graphs of the layers and of the loss's rows, forward and backward; all that Inductor makes
of them, fused kernels and the program that calls them in order; and what each Triton kernel computes.

Faked:

- The GPU. A graph is traced on CPU tensors, then moved to CUDA tensors without memory, for which
  Inductor writes code with an H200's properties. The code itself runs on CPU tensors.
- Matrix products are torch's own on the CPU. Attention is the formula of FlashAttention in float32,
  without dropout. RMSNorm has the gradient that torch takes on CUDA.
- Kernels run one program after the other: no races, no pipelining, no compiler below Triton. Where
  the interpreter differs from a GPU or is slow, `_mend_interpreter` says so.

Every buffer holds NaN until a kernel writes it. Import this file with TRITON_INTERPRET=1 in the
environment, before anything imports Triton.
"""

import types

import numpy as np
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
import torch.utils._triton
import triton.language as tl
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from triton.runtime import interpreter

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    gcnArchName="",
    multi_processor_count=132,
    total_memory=141 * 10**9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=60 << 20,
)


def run_as_on_an_h200(patch):
    """Makes torch.compile write an H200's code and run it; `patch` is a MonkeyPatch.

    Returns the programs that Inductor writes from now on, and for each rand4x of a kernel whether
    its offsets were contiguous: two lists.
    """
    programs, contiguous = [], []
    patch.setattr(GraphLowering, "save_output_code", programs.append)
    _pretend_a_gpu(patch)
    _move_graphs(patch)
    _replace_attention_and_norm(patch)
    _mend_interpreter(patch, contiguous)
    return programs, contiguous


def _pretend_a_gpu(patch):
    """Answers what Inductor and its programs ask of CUDA."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (9, 0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    patch.setattr(CudaInterface, "get_device_properties", lambda *_: H200)
    patch.setattr(FakeTensorMode, "avoid_device_init", True)
    patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    patch.setattr(torch.utils._triton, "triton_hash_with_backend", lambda: "")
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    patch.setattr(
        torch.ops.prims.inductor_lookup_seed.default,
        "prim_meta_impl",
        lambda seeds, _index: seeds.new_empty(()),  # its own indexes, for which torch needs CUDA
    )
    patch.setattr(torch._C._dynamo.guards, "_empty_strided_cuda", _poisoned)


def _poisoned(size, stride, dtype):
    """A new buffer, in which NaN shows whatever no kernel writes."""
    buffer = torch.empty_strided(size, stride, dtype=dtype)
    return buffer.fill_(float("nan") if dtype.is_floating_point else 77)


def _move_graphs(patch):
    """Moves each graph from the CPU to CUDA before Inductor sees it."""
    compile_graph = torch._inductor.compile_fx._compile_fx_inner

    def moved(argument):
        return CUDA if isinstance(argument, torch.device) else argument

    def compile_moved(graph, inputs, **options):
        with detect_fake_mode(inputs):
            inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA) for t in inputs]
        for node in graph.graph.nodes:
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(node.kwargs, moved)
        graph.recompile()
        return compile_graph(graph, inputs, **options)

    patch.setattr(torch._inductor.compile_fx, "_compile_fx_inner", compile_moved)


def _replace_attention_and_norm(patch):
    """Gives compiled code the operators of CUDA; eager code keeps its own."""

    def attention(q, k, v, dropout_p=0.0, is_causal=True, enable_gqa=False):
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

    def rms_norm(x, _shape, weight, eps):
        return RMSNormOnCuda.apply(x, weight, eps)

    def chosen(eager, on_cuda):
        def function(*arguments, **options):
            return (on_cuda if torch.compiler.is_compiling() else eager)(*arguments, **options)

        return function

    patch.setattr(F, "scaled_dot_product_attention", chosen(F.scaled_dot_product_attention, attention))
    patch.setattr(F, "rms_norm", chosen(F.rms_norm, rms_norm))


class RMSNormOnCuda(torch.autograd.Function):
    """RMSNorm by the operators that torch takes on CUDA alone."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = aten._fused_rms_norm(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        return *aten._fused_rms_norm_backward(dy, x, weight.shape, rstd, weight, [True, True]), None


def _scores(q, k):
    """Causal attention's scores, (B, H, T, T) in float32."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)


def _laid_out(x, q):
    """`x` in q's dtype, and in the layout in which FlashAttention writes."""
    return torch.empty_like(q.transpose(1, 2)).transpose(1, 2).copy_(x)


def _attention(q, k, v, dropout_p=0.0, is_causal=True, return_debug_mask=False, *, scale=None):
    scores, T = _scores(q, k), q.shape[2]
    output = _laid_out(scores.softmax(-1) @ v.float(), q)
    seed, offset, mask = torch.zeros(2).long(), torch.zeros(()).long(), q.new_empty(0)
    return output, scores.logsumexp(-1), None, None, T, T, seed.to(torch.uint64), offset, mask


def _attention_backward(dy, q, k, v, output, logsumexp, *_, **__):
    dy, output, scale = dy.float(), output.float(), q.shape[-1] ** -0.5
    p = (_scores(q, k) - logsumexp[..., None]).exp()
    ds = p * (dy @ v.float().mT - (dy * output).sum(-1, keepdim=True)) * scale
    gradients = ds @ k.float(), ds.mT @ q.float(), p.mT @ dy
    return tuple(_laid_out(gradient, q) for gradient in gradients)


LIBRARY = torch.library.Library("aten", "IMPL")  # the CPU has no kernel of these names
LIBRARY.impl("_scaled_dot_product_flash_attention", _attention, "CPU")
LIBRARY.impl("_scaled_dot_product_flash_attention_backward", _attention_backward, "CPU")


class Libdevice:
    """The functions of CUDA's libdevice, which the interpreter lacks."""

    def __getattr__(self, name):
        return getattr(tl.math, name)

    def tanh(self, x):
        return 2 * tl.sigmoid(2 * x) - 1


def _mend_interpreter(patch, contiguous):
    """Adds what the interpreter lacks, and a check of rand4x."""
    convert, rand4x = interpreter._convert_float, triton_helpers.rand4x

    def rounded(data, source, target, mode):  # the interpreter cuts digits off, a GPU rounds
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.tensor(data).bfloat16().view(torch.uint16).numpy()

    def rand4x_of(seed, offsets, BLOCK):  # takes the first offset, and the others for granted
        steps = np.diff(offsets.handle.data.astype(np.int64))
        contiguous.append(bool((steps == 1).all()) and offsets.handle.data[0] % 4 == 0)
        return rand4x(seed, offsets, BLOCK)

    patch.setattr(interpreter, "_convert_float", rounded)
    patch.setattr(triton_helpers, "rand4x", rand4x_of)
    patch.setattr(triton_helpers, "libdevice", Libdevice())
    patch.setattr(triton_helpers, "max2", tl.max)  # Inductor's takes minutes here
