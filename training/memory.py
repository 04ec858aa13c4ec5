"""What a step takes of memory, before it is taken: traced on tensors that have no memory."""

import collections
import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from training import distributed
from training.device import compiles
from training.io import UserError, log
from training.plan import GIB
from training.teacher_cache import free_bytes

# Of what eager layers keep for the backward pass, AOTAutograd's partition of llama-58m, llama-360m
# and gpt2-705m keeps 0.71, 0.71 and 0.69: it computes again what costs no product.
COMPILED_SHARE = 0.7
LOSS_TOKENS = 4096  # whose logits the loss has at a time, in eight bytes each: bf16 and rows
USABLE_SHARE = 0.9  # of free memory: the rest is for what the allocator cannot use
CARDS = (24, 80, 141)  # gigabytes, for advice where there is no GPU


@dataclasses.dataclass(frozen=True)
class Memory:
    """An estimate, in bytes: what a step of any size needs, and for each sequence at a time."""

    fixed: int
    per_sequence: int

    def of(self, sequences):
        """Bytes of a step that takes so many sequences at a time."""
        return self.fixed + sequences * self.per_sequence

    def sequences(self, batch_size, room):
        """The most sequences at a time, a divisor of the batch, for so many bytes; 0 if none."""
        fitting = (n for n in range(batch_size, 0, -1) if batch_size % n == 0)
        return next((n for n in fitting if self.of(n) <= USABLE_SHARE * room), 0)


def kept_bytes(model, sequences, length, precision, checkpointed=False):
    """Bytes that a model's forward pass keeps for the backward pass, weights aside.

    It is traced with fake tensors: nothing is computed. Under autocast, weights in bfloat16 count.
    `checkpointed` layers keep their input alone, and what one of them keeps is there at a time.
    """
    mode, kept, layer, inputs = FakeTensorMode(), {}, None, 0

    def enter(block, arguments):
        nonlocal layer, inputs
        layer, inputs = block, inputs + arguments[0].nbytes

    def leave(*_):
        nonlocal layer
        layer = None

    tensors = [*model.named_parameters(), *model.named_buffers()]
    fakes = {name: mode.from_tensor(tensor.detach()) for name, tensor in tensors}
    for name, parameter in model.named_parameters():
        fakes[name].requires_grad_(parameter.requires_grad)
    own = {fake.untyped_storage()._cdata for fake in fakes.values()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, (tensor, storage.nbytes(), layer))
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    training = model.training
    model.eval()  # the CPU has no FlashAttention with dropout, whose masks are few bytes anyway
    with mode, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.zeros(sequences, length, dtype=torch.int64)
        hooks = [block.register_forward_pre_hook(enter) for block in model.blocks]
        hooks += [block.register_forward_hook(leave) for block in model.blocks]
        logits = torch.func.functional_call(model, fakes, (tokens,))
    model.train(training)
    del logits  # it holds the graph, and the graph what was kept
    for hook in hooks:
        hook.remove()
    within = collections.Counter()
    for _, size, block in kept.values():
        within[block] += size
    if not checkpointed:
        return within.total()
    return within.pop(None, 0) + max(within.values()) + inputs


def estimate(objective, length, precision, compiled, checkpointed=False, parts=1):
    """The `Memory` of a training step of an objective, `length` positions a sequence.

    Weights, gradients and two moments in float32; frozen models as they are; what is kept for the
    backward pass, as FlashAttention keeps it; and the loss. Sharded into `parts`, a process has its
    part of the state, and whole what is outside of the layers, and two of them, with a gradient.
    """
    model = objective.model
    one, two = (kept_bytes(model, n, length, precision, checkpointed) for n in (1, 2))
    trained = [p.numel() for p in objective.parameters() if p.requires_grad]
    state = 16 * sum(trained) // parts
    state += sum(p.nbytes for p in objective.parameters() if not p.requires_grad)
    if parts > 1:
        layers = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        state += 8 * (sum(trained) - sum(layers) + 2 * max(layers))
    share = COMPILED_SHARE if compiled else 1
    loss = 8 * LOSS_TOKENS * len(model.head)
    return Memory(state + max(2 * one - two, 0) + loss, round(share * (two - one)))


def choose_micro_batch(config, objective, compute):
    """`config` with a number for --micro-batch-size auto; prints the estimate in a dry run.

    Raises `UserError` where not even one sequence fits.
    """
    wanted = config.micro_batch_size == "auto"
    if not wanted and not config.dry_run:
        return config
    compiled = compiles(config.compile, compute)
    again = config.checkpoint_activations
    parts = distributed.world_size() if config.shard else 1
    options = config.sequence_length, compute.precision, compiled, again, parts
    memory = estimate(objective, *options)
    on_cuda = compute.device.type == "cuda"
    room = free_bytes("gpu" if on_cuda else "host", compute.device)
    if room is not None and not on_cuda:
        room //= distributed.world_size()
    sequences, whole = config.micro_batch_size, -(-config.batch_size // distributed.world_size())
    if wanted:
        if room is None:
            raise UserError("--micro-batch-size auto: free memory is not known; give a number")
        sequences = min(distributed.all_gather(memory.sequences(whole, room)))
        if not sequences:
            raise UserError(
                f"--micro-batch-size auto: one sequence needs {memory.of(1) / GIB:.1f} GiB and "
                f"{room / GIB:.1f} are free: choose a smaller model"
            )
        config = dataclasses.replace(config, micro_batch_size=sequences)
    at_a_time = sequences or whole
    log(f"estimate   {memory.of(at_a_time) / GIB:.1f} GiB for {at_a_time} sequences at a time")
    if config.dry_run:
        memory = estimate(objective, config.sequence_length, "bf16", True, again, parts)
        fitting = {size: memory.sequences(whole, size * 10**9) for size in CARDS}
        cards = [f"{n or 'none'} on a GPU of {size} GB" for size, n in fitting.items()]
        log(f"--micro-batch-size, estimated: {', '.join(cards)}")
    return config
