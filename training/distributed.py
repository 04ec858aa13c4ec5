"""One run on several processes that torchrun starts: ranks, what they exchange, DDP and FSDP.

    torchrun --nproc-per-node=2 train.py --model llama-58m

Each rank computes its part of every batch, and gradients are summed, because losses divide by the
counts of the whole batch: N ranks compute the run of one process. Rank 0 alone prints and writes.
Without torchrun there is one rank, and nothing here has an effect.
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
    """Joins the process group of torchrun, if there is one; `io.log` then prints on rank 0 alone."""
    if not is_torchrun() or dist.is_initialized():
        return
    # gloo's threads abort a process that ends before they do. So nothing may refer to the group at
    # the end: these modules refer to the one that exists when they are imported, which is none yet;
    # garbage is collected after `_destroy`.
    import torch.distributed.nn  # noqa: F401

    atexit.register(gc.collect)
    on_gpu = device.type == "cuda"  # gradients by NCCL, numbers of the host by gloo
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the processes that torchrun names: {error}") from error
    if rank():
        io.rank_prefix = f"rank {rank()}: "


def destroy_when_done():
    """Leaves the process group first when this process ends.

    A rank that failed does not leave: NCCL would wait for the others, and torchrun would not notice.
    """
    atexit.unregister(_destroy)
    atexit.register(_destroy)  # what is registered last runs first


def _destroy():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Returns the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_torchrun():
    """Returns True if torchrun has started this process, even as the only one."""
    return "WORLD_SIZE" in os.environ


def local_rank():
    """Returns the number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node_rank():
    """Returns the number of this machine, from 0, or None if all processes are on one."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
    return int(os.environ.get("GROUP_RANK", "0")) if on_this_machine < world_size() else None


# ---- what ranks exchange on the host: all ranks must call these functions


def all_gather(value):
    """Returns the list of all ranks' values, in the order of ranks, the same on each of them."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def rank_zero_first(action, is_first):
    """Returns `action()`, which ranks with `is_first` finish before the others begin."""
    if not is_first:
        all_gather(None)
    result = action()
    if is_first:
        all_gather(None)
    return result


def check_same_on_all_ranks(values):
    """Raises `UserError` on all ranks unless each has the same {name: value}."""
    first, *others = all_gather(values)
    for number, other in enumerate(others, start=1):
        if differing := ", ".join(name for name in first if other.get(name) != first[name]):
            remedy = "give the same files and options on every machine"
            raise UserError(f"process {number} has another {differing} than process 0: {remedy}")


# ---- one model on several ranks


def wrap_ddp(objective, device):
    """Returns the objective on `device`; with several ranks a DDP module that sums its gradients."""
    objective.to(device)
    if not dist.is_initialized():
        return objective
    # Buffers never change, so they need no broadcast. Torch 2.13 renamed the option.
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    module = DistributedDataParallel(objective, gradient_as_bucket_view=True, **{name: False})

    def sum_gradients(_state, bucket):  # without this hook DDP takes the mean
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda future: future.value()[0])

    module.register_comm_hook(None, sum_gradients)
    return module


def wrap_fsdp(objective, device):
    """Returns the objective on `device`, with its trained parameters sharded over all ranks (FSDP2).

    A rank keeps its shard of every parameter, gradient and moment. A layer is gathered when it is
    needed; the embedding and the head stay gathered for the whole step. Frozen models are not sharded.
    """
    if not dist.is_initialized():
        raise UserError("--shard needs several processes: start them with torchrun")
    from torch.distributed.fsdp import fully_shard  # here, because the import takes seconds

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    # DTensor's caches keep the mesh, and with it the process group: see `init_distributed`.
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)
    frozen = {p for p in objective.parameters() if not p.requires_grad}
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh, ignored_params=frozen)
    for module in objective.modules():
        if is_sharded(module):  # sum gradients, in place of the mean
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return objective.to(device)


def unwrap(module):
    """Returns the objective in a module of `wrap_ddp` or `wrap_fsdp`."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def is_sharded(module):
    """Returns True if the module's parameters are sharded over ranks."""
    return hasattr(module, "set_gradient_divide_factor")


def micro_batch_sizes(sequences, batch_size, largest):
    """Returns the micro-batch sizes of a rank that has `sequences` of the batch: a number, or a list.

    With several ranks all take the same number of micro-batches, because FSDP gathers layers on all
    of them at the same time. So a micro-batch may have one sequence more than `largest`.
    """
    if world_size() == 1 or not largest:
        return largest or sequences
    most, least = -(-batch_size // world_size()), batch_size // world_size()
    count = min(-(-most // largest), least)
    return [sequences // count + (i < sequences % count) for i in range(count)]


def set_gradient_sync(module, sync):
    """Sets whether the next backward pass of a DDP module ends with the all-reduce of gradients.

    FSDP always reduces after each micro-batch: otherwise each rank would hold full gradients.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync


def all_reduce_sum(terms):
    """Returns {name: sum over all ranks} of scalars on the device."""
    if not dist.is_initialized():
        return terms
    values = torch.stack(list(terms.values()))
    dist.all_reduce(values)
    return dict(zip(terms, values.unbind()))


@contextlib.contextmanager
def unsharded(objective):
    """Gathers the parameters outside of the layers, for an evaluation that calls the model itself."""
    sharded = is_sharded(objective)
    if sharded:
        objective.unshard()
    yield
    if sharded:
        objective.reshard()


def full_tensor(tensor):
    """Returns the full tensor of one that may be sharded. All ranks must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_to(target, value):
    """Copies a full tensor `value` to `target`, which may be sharded. All ranks must call it."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # seconds, as above

        mesh, placements = target.device_mesh, target.placements
        value = distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)
    target.copy_(value)
