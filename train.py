"""Trains a GPT-2 or a LLaMA on token shards: the one training loop of this project.

    python train.py --model llama-58m                 with the preset's own recipe
    python train.py --model llama-58m --dry-run       prints the plan and stops

The run's folder holds checkpoint.pt (full state), previous.pt (the one before), best.pt (weights at
the best dev cross-entropy) and log.jsonl. The same command continues a run that was stopped.
"""

import contextlib
import dataclasses
import functools
import math
import sys

import torch
from torch import nn

from loss import linear_cross_entropy
from training import distributed, resume
from training.average import WeightAverage
from training.device import (
    checkpoint_activations,
    choose_compute,
    choose_device,
    compile_and_check_blocks,
    largest_micro_batch,
    should_capture,
    skips_on_device,
)
from training.io import locked, log, run_program
from training.logger import StopSignal, TrainingLogger, exit_code
from training.options import RECIPE, SAVE, SPEED, RunConfig, option, parse
from training.plan import log_averaging_time, plan_run, print_plan

CPU_EVAL_BATCH, GPU_EVAL_TOKENS = 32, 32_768  # sequences; tokens
NO_DECAY = ("layernorm", "norms", "norms+embeddings")
PRESET = "(default: the preset's)"
recipe = functools.partial(option, group=RECIPE)


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    model: str = option("llama-58m", "preset to train, from the list below")
    data: str = option("data/babylm", "folder with train.bin, dev.bin and tokenizer.model", may_change=True)
    init: str | None = option(
        None,
        "start from the weights and shape of this checkpoint; --model then gives only the recipe",
        may_change=True,
    )
    shape: str | None = option(None, "change the preset's shape, as in hidden_size=384,num_hidden_layers=10")
    epochs: float | None = recipe(None, f"passes over the data {PRESET}", exclusive=True, minimum=1e-6)
    steps: int | None = recipe(None, "optimizer steps, instead of --epochs", exclusive=True, minimum=1)
    batch_size: int | None = recipe(None, f"sequences per step, over all GPUs {PRESET}", minimum=1)
    sequence_length: int = recipe(128, "tokens per sequence", minimum=1)
    random_offset: bool = recipe(False, "shift each sequence by a random number of tokens, anew each epoch")
    learning_rate: float | None = recipe(None, f"peak learning rate {PRESET}", minimum=0, alias="--lr")
    warmup_steps: int | None = recipe(
        None, f"steps of linear warm-up, at most a tenth of all steps {PRESET}", minimum=0
    )
    schedule: str = recipe("cosine", "learning-rate decay after warm-up", choices=("cosine", "linear"))
    min_lr_ratio: float = recipe(0.0, "final learning rate divided by the peak", minimum=0, maximum=1)
    weight_decay: float | None = recipe(None, f"decoupled weight decay {PRESET}", minimum=0)
    no_decay: str = recipe(
        "layernorm", "parameters without weight decay besides biases; norms: also RMSNorm", choices=NO_DECAY
    )
    dropout: float | None = recipe(
        None, f"dropout probability {PRESET}", minimum=0, maximum=0.999, may_change=True
    )
    clip: float = recipe(1.0, "maximum gradient norm; 0: no clipping", minimum=0)
    optimizer: str = recipe(
        "adamw", "muon: Muon for the layers' weight matrices, AdamW for the rest", choices=("adamw", "muon")
    )
    beta2: float = recipe(0.999, "decay of AdamW's mean of squared gradients", minimum=0, maximum=0.999999)
    average_last: float = recipe(
        0.0, "average the weights over this share of the steps, the last ones", minimum=0, maximum=1
    )
    eval_sequences: int = option(
        1024, "largest number of dev (validation) sequences per evaluation", SAVE, minimum=1, may_change=False
    )
    micro_batch_size: int | None = option(
        None,
        "sequences per forward and backward pass (gradient accumulation); auto: as many as fit in "
        "memory (default: the whole batch)",
        SPEED,
        word="auto",
        minimum=1,
    )


# ---- objective, schedule, optimizer, step


class Objective(nn.Module):
    """Base class of what `fit` trains: a module that owns the trained model, `model`, and its loss.

    All its parameters that require gradients are trained and saved, also those outside of the model.
    """

    compiled = False  # True with --compile: `forward` may then compile its own functions

    def __init__(self, model):
        super().__init__()
        self.model = model

    def prepare(self, batch):
        """Returns the micro-batch, with what is computed without gradients, such as teachers' states."""
        return batch

    def forward(self, batch):
        """Returns {"loss": scalar, ...}: what a prepared micro-batch adds to the values of the step."""
        raise NotImplementedError


class CrossEntropyObjective(Objective):
    """-log p(next token), the mean over the step's targets: training without a teacher."""

    def forward(self, batch):
        hidden = self.model.hidden_states(batch.tokens)  # (B, T, C)
        loss = linear_cross_entropy(
            hidden, self.model.head, batch.targets, batch.num_targets, compiled=self.compiled
        )
        return {"loss": loss, "cross_entropy": loss.detach()}


def learning_rate(step, steps, peak, warmup_steps, min_ratio=0.0, schedule="cosine"):
    """The learning rate of step 0, 1, ...: linear warm-up to `peak`, then decay.

    The warm-up begins at 0 and takes `warmup_steps`, at most a tenth of the steps. The decay is a
    cosine or, with the schedule "linear", a line. It ends at `min_ratio` · peak: 0 in the paper's code.
    """
    warmup_steps = min(warmup_steps, steps // 10)
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / (steps - warmup_steps)
    factor = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (min_ratio + (1 - min_ratio) * factor)


def build_optimizer(objective, weight_decay, name="adamw", beta2=0.999, no_decay="layernorm"):
    """A list of optimizers of all parameters that require gradients. Add an optimizer here.

    The `lr` of a group is its ratio to the scheduled learning rate. Biases and LayerNorm's parameters
    have no weight decay, as in the paper's version of transformers (4.29.1, `ALL_LAYERNORM_LAYERS`).
    `no_decay` adds RMSNorm's ("norms"), whose gains strong decay would shrink to zero, and embeddings.
    Muon's updates have AdamW's size ("match_rms_adamw"), so that one learning rate suits both.
    """
    trained = resume.trained_parameters(objective).values()
    without_decay = {
        parameter
        for module in objective.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm)
        or key == "bias"
        or (parameter.dim() < 2 and no_decay != "layernorm")
        or (isinstance(module, nn.Embedding) and no_decay == "norms+embeddings")
    }
    blocks = objective.model.blocks if name == "muon" else ()
    matrices = {p for block in blocks for p in block.parameters() if p.dim() == 2} - without_decay
    others = [p for p in trained if p not in matrices]
    groups = [
        {"params": [p for p in others if p not in without_decay], "weight_decay": weight_decay},
        {"params": [p for p in others if p in without_decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=1.0, betas=(0.9, beta2), eps=1e-8, fused=True)]
    if matrices:
        parameters = [p for p in trained if p in matrices]
        optimizers.append(
            torch.optim.Muon(parameters, lr=1.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


class TrainStep:
    """`train_step(batch, learning_rate)`: forward, backward, clip, update, all on the device.

    `module` is the objective, or its DistributedDataParallel or FSDP2 wrapper. Returns what the
    objective returns and the gradient norm before clipping, as tensors on the device. A step whose
    gradient is not finite changes no parameter and is counted. Fused AdamW skips it on the device;
    for other optimizers the host waits for the gradient norm.
    """

    def __init__(self, module, optimizers, autocast, micro_batch_size=None, clip=1.0):
        self.module, self.objective = module, distributed.unwrap(module)
        self.optimizers, self.autocast = optimizers, autocast
        self.micro_batch_size, self.clip = micro_batch_size, clip or math.inf
        self.parameters = resume.trained_parameters(self.objective)
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.rate_ratios = [group["lr"] for group in self.groups]
        optimized = [id(p) for group in self.groups for p in group["params"]]
        if sorted(optimized) != sorted(map(id, self.parameters.values())):
            raise ValueError("each parameter that is trained must be in one group of an optimizer")
        device = next(iter(self.parameters.values())).device
        self.nonfinite_in_a_row = torch.zeros((), device=device)
        self.nonfinite_steps = torch.zeros((), device=device)
        self.average = WeightAverage()

    def __call__(self, batch, learning_rate):
        for group, ratio in zip(self.groups, self.rate_ratios):
            group["lr"] = learning_rate * ratio
        return self.update(self.prepare(batch))

    def prepare(self, batch):
        """The micro-batches of a step, as the objective prepares them."""
        sizes = distributed.micro_batch_sizes(len(batch.tokens), batch.num_sequences, self.micro_batch_size)
        with self.autocast:
            return [self.objective.prepare(micro_batch) for micro_batch in batch.split(sizes)]

    def update(self, micro_batches):
        """The step from prepared micro-batches: always the same kernels, so a CUDA graph can replay it."""
        sums = {}
        for micro_batch in micro_batches:
            # Gradients are all-reduced once a step, in the backward pass of its last micro-batch.
            distributed.set_gradient_sync(self.module, micro_batch is micro_batches[-1])
            with self.autocast:
                terms = self.module(micro_batch)
            terms["loss"].backward()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0) + value.detach()
        sums = distributed.all_reduce_sum(sums)
        norm = distributed.full_tensor(nn.utils.clip_grad_norm_(self.parameters.values(), self.clip))
        nonfinite = (~torch.isfinite(norm)).float()
        self.nonfinite_in_a_row.add_(1).mul_(nonfinite)
        self.nonfinite_steps.add_(nonfinite)
        for optimizer in self.optimizers:
            if skips_on_device(optimizer):
                optimizer.found_inf = nonfinite
                optimizer.step()
            elif not nonfinite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {**sums, "gradient_norm": norm, "nonfinite_steps": self.nonfinite_steps}


def build_train_step(objective, config, stream, compute):
    """The `TrainStep` of a config. Moves the objective to its device and wraps it for several GPUs."""
    objective.train()
    if config.checkpoint_activations:
        checkpoint_activations(objective.model, compute)
    micro_batch_size = config.micro_batch_size
    if micro_batch_size == "auto":
        micro_batch_size = largest_micro_batch(objective, stream(0), compute, config.shard)
    wrap = distributed.wrap_fsdp if config.shard else distributed.wrap_ddp
    module = wrap(objective, compute.device)
    optimizers = build_optimizer(
        objective, config.weight_decay, config.optimizer, beta2=config.beta2, no_decay=config.no_decay
    )
    return TrainStep(module, optimizers, compute.autocast, micro_batch_size, config.clip)


def fast_step(train_step, config, stream, compute, captured):
    """The train step with compiled layers, if the config says so, and as a CUDA graph, if `captured`."""
    if config.compile or (config.compile is None and compute.device.type == "cuda"):
        batch = stream(0).rank_slice(distributed.rank(), distributed.world_size())
        compile_and_check_blocks(train_step.objective, batch.tokens[: config.micro_batch_size], compute)
    if not captured:
        return train_step
    from training.cuda_graph import GraphedStep  # here, because most runs capture no graph

    return GraphedStep(train_step)


@torch.no_grad()
def dev_cross_entropy(model, shard, starts, sequence_length, autocast):
    """Mean cross-entropy, in nats per token, of the dev chunks that begin at `starts`."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    total, rank, world_size = 0.0, distributed.rank(), distributed.world_size()
    on_cpu = device.type == "cpu"
    batch_size = world_size * (CPU_EVAL_BATCH if on_cpu else max(GPU_EVAL_TOKENS // sequence_length, 1))
    for i in range(0, len(starts), batch_size):
        own = starts[i : i + batch_size][rank::world_size]
        # A rank without chunks of its own runs the model too: all ranks must join FSDP's all-gather.
        tokens, targets = shard.chunks(own if len(own) else starts[:1], sequence_length)
        with autocast:
            hidden = model.hidden_states(tokens.to(device))
            loss = linear_cross_entropy(hidden, model.head, targets.to(device), num_targets=1).item()
        total += loss if len(own) else 0.0
    model.train(training)
    return sum(distributed.all_gather(total)) / (len(starts) * sequence_length)


# ---- the loop


def fit(objective, config, stream, evaluate, provenance):
    """Trains an `Objective` and returns its progress: "step", "steps", "dev_cross_entropy", ...

    `stream(step)` returns a step's batch; `stream.num_chunks`, `num_tokens`, `words` are an epoch's.
    `evaluate(model, autocast)` returns {"dev_cross_entropy": ..., other values to log}. best.pt has
    the lowest dev cross-entropy or, if there is a "score", the highest score. In the progress,
    "stopped_by" is the signal that stopped the run, or None. Raises `UserError` for a bad config.
    """
    compute = choose_compute(config.device, config.precision)
    plan = plan_run(config, stream.num_chunks, stream.words, stream.num_tokens)
    resume.check_settings(config, provenance)
    print_plan(plan, config.out, provenance, objective, stream.num_tokens, compute)
    log_averaging_time(plan, config)
    if config.warmup_steps > plan.steps // 10:
        log(f"warm-up    {plan.steps // 10} steps, a tenth of the run, instead of {config.warmup_steps}")
    if config.dry_run:
        return resume.new_progress(plan.steps)
    train_step = build_train_step(objective, config, stream, compute)
    config = dataclasses.replace(config, micro_batch_size=train_step.micro_batch_size)
    flops = 6 * sum(p.numel() for p in train_step.parameters.values()) * plan.tokens_seen(1)
    if plan.averaged_steps:
        train_step.average = WeightAverage(train_step.parameters, plan.steps - plan.averaged_steps + 1)
    captured = should_capture(config, compute, train_step.optimizers, flops)
    with locked(config.out) if distributed.rank() == 0 else contextlib.nullcontext():
        progress = resume.start_or_resume(train_step, config, provenance, plan.steps)
        if resume.is_finished(progress, config.patience):
            return progress
        take_step = fast_step(train_step, config, stream, compute, captured)
        logger = TrainingLogger(train_step, config, plan, provenance, progress)
        with logger, StopSignal(config.stop_after) as stop:
            for step in range(progress["step"] + 1, plan.steps + 1):
                rate = learning_rate(
                    step - 1,
                    plan.steps,
                    config.learning_rate,
                    config.warmup_steps,
                    min_ratio=config.min_lr_ratio,
                    schedule=config.schedule,
                )
                batch = stream(step - 1).rank_slice(distributed.rank(), distributed.world_size())
                terms = take_step(batch.to(compute.device), rate)
                train_step.average.update(step)
                logger.count(step)
                last = step == plan.steps
                if last or step % config.log_every == 0:
                    logger.log_step(terms, rate)
                if last or plan.evaluates_at(step):
                    logger.evaluate(evaluate)
                    last = resume.is_finished(progress, config.patience)
                stopping = stop.is_requested()
                if last or stopping or logger.is_save_due():
                    logger.save()
                if last or stopping:
                    break
        if last:
            logger.log_finished()
        else:
            log(f"stopped after step {step} of {plan.steps}: the same command continues")
    return progress | {"stopped_by": stop.number}


def fit_corpus(objective, config, corpus, name, init_digest=None, teachers=()):
    """`fit` on the chunks of a corpus, evaluated on a fixed subset of its dev chunks.

    `name` is the model's name in checkpoints; `teachers` are [{"name", "digest"}].
    """
    # Imported here: a program that gives its own data to `fit` needs no corpus and no presets.
    from data import BatchStream, dev_subset
    from model import architecture

    length, device = config.sequence_length, choose_compute(config.device).device
    stream = BatchStream(corpus.train, config.batch_size, length, config.seed, config.random_offset, device)
    starts = dev_subset(corpus.dev, length, config.eval_sequences)

    def evaluate(model, autocast):
        return {"dev_cross_entropy": dev_cross_entropy(model, corpus.dev, starts, length, autocast)}

    shape = objective.model.config
    digests = {"train_shard": corpus.train.digest, "dev_shard": corpus.dev.digest, "init_digest": init_digest}
    provenance = resume.Provenance(
        name, architecture(shape), shape, corpus.tokenizer, digests, tuple(teachers)
    )
    return fit(objective, config, stream, evaluate, provenance)


def main(argv=None):
    import model as models  # here, as in `fit_corpus`
    from data import open_corpus

    config = models.with_hyperparameters(parse(TrainConfig, __doc__, argv, models.preset_table))
    distributed.init_distributed(choose_device(config.device))
    corpus = open_corpus(config.data)
    model, name, init_digest = models.initial_model(config, corpus)
    return exit_code(fit_corpus(CrossEntropyObjective(model), config, corpus, name, init_digest))


if __name__ == "__main__":
    sys.exit(run_program(main))
