"""One run on several processes: who this one is, and what they tell each other.

    torchrun --nproc-per-node=2 train.py --model llama-58m

torchrun starts the processes and names them in environment variables. All of them take the same
steps: each computes its share of the batch, and gradients are summed, for losses divide by counts
of the whole batch. So N processes compute the run of one. The first process alone prints and
writes. Without torchrun there is one process, and nothing here changes anything.
"""

import atexit
import contextlib
import gc
import inspect
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from training import io
from training.io import UserError


def init_distributed(device):
    """Joins the processes that torchrun has started, where it has; the first one is to print.

    Numbers of the host travel by gloo, gradients by NCCL where they are on a GPU.
    """
    if not is_torchrun() or dist.is_initialized():
        return
    # When a process ends, nothing may keep its group: gloo's threads would outlive it, and abort
    # the process if they want the interpreter after its end. These functions keep the group that
    # there is when they are imported, as DistributedDataParallel does.
    import torch.distributed.nn  # noqa: F401

    atexit.register(gc.collect)  # last, after `_leave`
    try:
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the processes that torchrun names: {error}") from error
    if rank():
        io.rank_prefix = f"rank {rank()}: "


def destroy_when_done():
    """Leaves the other processes when this one ends.

    Not before all is done: NCCL would wait for the others, and torchrun not learn of a failure.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_torchrun():
    """Whether torchrun has started this process, even if it is the only one."""
    return "WORLD_SIZE" in os.environ


def local_rank():
    """This process's number among those of its machine, from 0, whether it has joined or not."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node_rank():
    """This process's machine among several, from 0; None where there is one."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
    return int(os.environ.get("GROUP_RANK", "0")) if together < world_size() else None


# ---- what the processes tell each other, on the host


def all_gather(value):
    """The value that each process gives, a list in the order of ranks: the same on all of them."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_across_ranks(number):
    """The sum of the processes' numbers, added in the order of ranks."""
    return sum(all_gather(number))


def rank_zero_first(action, is_first):
    """`action()`, done by the first processes before the others begin; what it returns here."""
    if not is_first:
        all_gather(None)
    outcome = action()
    if is_first:
        all_gather(None)
    return outcome


def check_same_on_all_ranks(facts):
    """Raises `UserError` on all processes unless {name: value} is the same on each of them."""
    everyone = all_gather(facts)
    for number, theirs in enumerate(everyone):
        differing = [key for key in facts if theirs.get(key) != everyone[0].get(key)]
        if differing:
            raise UserError(
                f"process {number} has another {', '.join(differing)} than process 0: give the "
                "same files and options on every machine"
            )


def rank_zero_only(context):
    """`context()` on the first process; on the others one in which nothing happens."""
    return context() if rank() == 0 else contextlib.nullcontext()


# ---- one model on several processes


def wrap_ddp(objective, device, shard=False):
    """The objective on the device, and what is to be called in its stead: it sums gradients.

    With `shard` each process keeps a part of every parameter of the model in training, and of its
    gradient and moments (FSDP2): layers are put together when they are needed, embedding and head
    for the whole step. Frozen models stay whole.
    """
    if not dist.is_initialized():
        if shard:
            raise UserError("--shard needs several processes: start them with torchrun")
        return objective.to(device)
    if not shard:
        objective.to(device)
        # Buffers are the same everywhere and never change; torch 2.13 has renamed the option.
        accepted = inspect.signature(DistributedDataParallel).parameters
        option = {"forward_sync_buffers", "broadcast_buffers"} & accepted.keys()
        module = DistributedDataParallel(objective, gradient_as_bucket_view=True, **{max(option): False})
        module.register_comm_hook(None, _sum_gradients)
        return module
    from torch.distributed.fsdp import fully_shard  # here, because it takes seconds

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    # DTensor's caches keep the mesh, which keeps the group: see `join`.
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)
    frozen = {p for p in objective.parameters() if not p.requires_grad}
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh, ignored_params=frozen)
    for module in objective.modules():
        if is_sharded(module):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return objective.to(device)


def unwrap(module):
    """The objective of which `spread` made the module."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _sum_gradients(_state, bucket):
    """DistributedDataParallel's hook: it would divide by the number of processes otherwise."""
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda future: future.value()[0])


def is_sharded(module):
    """Whether each process has a part of the module's parameters."""
    return hasattr(module, "set_gradient_divide_factor")


def micro_batch_sizes(sequences, batch_size, largest):
    """Sequences of each micro-batch of a process that has so many of the batch: a number, or each.

    All processes take as many micro-batches, because sharded layers are put together by all at the
    same time. None is empty: one may have a sequence more than `largest`.
    """
    if world_size() == 1 or not largest:
        return largest or sequences
    most, least = -(-batch_size // world_size()), batch_size // world_size()
    count = min(-(-most // largest), least)
    return [sequences // count + (i < sequences % count) for i in range(count)]


def set_gradient_sync(module, wanted):
    """Whether the next backward pass of `spread`'s module ends with the sum of all gradients.

    Sharded models sum them always: what is not summed is kept whole.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = wanted


def all_reduce_sum(terms):
    """{name: the sum of the processes' scalars on the device}."""
    if not dist.is_initialized():
        return terms
    values = torch.stack(list(terms.values()))
    dist.all_reduce(values)
    return dict(zip(terms, values.unbind()))


@contextlib.contextmanager
def unsharded(objective):
    """Within it the parameters outside of the layers are whole, as evaluations read them."""
    sharded = is_sharded(objective)
    if sharded:
        objective.unshard()
    yield
    if sharded:
        objective.reshard()


def full_tensor(tensor):
    """The whole of a tensor of which each process may have a part. All must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_to(place, value):
    """Copies `value`, the same on all processes, to a tensor of which each may have a part."""
    if hasattr(place, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = place.device_mesh, place.placements
        value = distribute_tensor(value.to(place.device), mesh, placements, src_data_rank=None)
    place.copy_(value)
