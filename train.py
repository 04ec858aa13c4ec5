"""Trains a GPT-2 or a LLaMA on token shards: the one training loop of this project.

    python train.py --model llama-58m                 its recipe comes with it
    python train.py --model llama-58m --dry-run       the arithmetic, and nothing else

The run's folder holds checkpoint.pt (full state), previous.pt (the one before), best.pt (weights at
the best dev cross-entropy) and log.jsonl. The same command continues a run that was stopped.
"""

import contextlib
import dataclasses
import math
import sys

import torch
from torch import nn

import model as models
from data import BatchStream, dev_subset, open_corpus, prefetch
from loss import linear_cross_entropy
from training import distributed, resume
from training.cuda_graph import GraphedStep, should_capture
from training.device import (
    checkpoint_activations,
    choose_compute,
    choose_device,
    compile_blocks,
    largest_micro_batch,
    skips_on_device,
)
from training.io import locked, log, run_program
from training.logger import StopSignal, TrainingLogger, exit_code
from training.options import RunConfig, option, parse
from training.plan import plan_run, print_plan

EVAL_BATCH_SIZE = 32  # sequences
NO_DECAY = ("layernorm", "norms", "norms+embeddings")


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    model: str = option("llama-58m", "preset, from the list below")
    init: str | None = option(
        None,
        "start from this checkpoint's weights and shape; --model then only gives the recipe",
        may_change=True,
    )
    shape: str | None = option(None, "change the preset's shape: hidden_size=384 and so on")
    dropout: float | None = option(
        None, "probability; default: the shape's", minimum=0, maximum=0.999, may_change=True
    )
    data: str = option("data/babylm", "folder of train.bin, dev.bin and tokenizer.model", may_change=True)
    epochs: float | None = option(
        None, "passes over the data; default: the preset's", exclusive=True, above=0
    )
    steps: int | None = option(
        None, "number of optimizer steps (give this or --epochs)", exclusive=True, minimum=1
    )
    batch_size: int | None = option(None, "sequences a step; default: the preset's", minimum=1)
    micro_batch_size: int | None = option(
        None,
        "sequences a rank computes at a time; auto: as many as fit in a GPU's memory (default: all)",
        word="auto",
        minimum=1,
        may_change=True,
    )
    sequence_length: int = option(128, "tokens of a chunk, T", minimum=1)
    random_offset: bool = option(False, "shift each chunk by 0 to T-1 tokens, redrawn each epoch")
    optimizer: str = option("adamw", "muon takes the layers' matrices", choices=("adamw", "muon"))
    learning_rate: float | None = option(None, "peak rate; default: the preset's", minimum=0)
    schedule: str = option("cosine", "from the peak to the end", choices=("cosine", "linear"))
    min_lr_ratio: float = option(0.0, "the last rate as a share of the peak", minimum=0, maximum=1)
    warmup_steps: int | None = option(
        None, "steps to the peak, at most a tenth of all; default: the preset's", minimum=0
    )
    weight_decay: float | None = option(None, "decoupled; default: the preset's", minimum=0)
    no_decay: str = option(
        "layernorm", "exempt from decay, with all biases; RMSNorm is among norms", choices=NO_DECAY
    )
    label_smoothing: float = option(
        0.0, "share of the target spread over the vocabulary", minimum=0, maximum=0.999
    )
    beta2: float = option(0.999, "AdamW's decay of squared gradients", minimum=0, maximum=0.999999)
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", minimum=0)
    eval_sequences: int = option(1024, "dev chunks of an evaluation, always the same", minimum=1)


# ---- objective, schedule, optimizer, step


class CrossEntropyObjective(nn.Module):
    """-log p(next token), the mean over the step's targets: what a model trains on alone."""

    compiled = False

    def __init__(self, model, label_smoothing=0.0):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def prepare(self, batch):
        """Plain training needs nothing more; the ensemble objective adds the teachers' states."""
        return batch

    def forward(self, batch):
        hidden = self.model.hidden_states(batch.tokens)
        loss, cross_entropy = linear_cross_entropy(
            hidden,
            self.model.head,
            batch.targets,
            batch.num_targets,
            self.label_smoothing,
            compiled=self.compiled,
        )
        return {"loss": loss, "cross_entropy": cross_entropy}


def learning_rate(step, steps, peak, warmup_steps, min_ratio=0.0, schedule="cosine"):
    """The rate of step 0, 1, ...: linear to `peak` at `warmup_steps`, then a cosine to its end.

    The end, at `steps`, is `min_ratio` of the peak: 0 in the original, as is a warm-up's first.
    With the schedule "linear" a line takes the cosine's place.
    """
    warmup_steps = min(warmup_steps, steps // 10)
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / (steps - warmup_steps)
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (min_ratio + (1 - min_ratio) * left)


def build_optimizer(objective, weight_decay, name="adamw", beta2=0.999, no_decay="layernorm"):
    """The optimizers, a list, of all parameters that require gradients. Another one goes here.

    `lr` of a group is its ratio to the scheduled rate; what an optimizer keeps by parameter is
    saved and resumed. AdamW 0.9 / beta2 / 1e-8 decays all but biases and what `no_decay` says: only
    LayerNorm in the version that the paper ran (transformers 4.29.1, `ALL_LAYERNORM_LAYERS`), but
    strong decay needs `norms`, as it takes RMSNorm's gains to zero. Muon's updates have AdamW's
    size ("match_rms_adamw"), so that both take the same rate.
    """
    trained = resume.trained_parameters(objective).values()
    exempt = {
        parameter
        for module in objective.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm)
        or key == "bias"
        or (parameter.dim() < 2 and no_decay != "layernorm")
        or (isinstance(module, nn.Embedding) and no_decay == "norms+embeddings")
    }
    blocks = objective.model.blocks if name == "muon" else ()
    matrices = {p for block in blocks for p in block.parameters() if p.dim() == 2} - exempt
    others = [p for p in trained if p not in matrices]
    groups = [
        {"params": [p for p in others if p not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in others if p in exempt], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=1.0, betas=(0.9, beta2), eps=1e-8, fused=True)]
    if matrices:
        muon = {"lr": 1.0, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon([p for p in trained if p in matrices], **muon))
    return optimizers


class TrainStep:
    """`train_step(batch, learning_rate)`: forward, backward, clip, update, all on the device.

    `module` is the objective, perhaps wrapped for several ranks (`training/distributed.py`).
    Returns the objective's terms and the gradient's norm before clipping, as tensors on the device.
    A gradient that is not finite changes nothing, and is counted, in a row and in all. Fused
    optimizers skip such a step on the device, others at the cost of waiting for it.
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

    def __call__(self, batch, learning_rate):
        for group, ratio in zip(self.groups, self.rate_ratios):
            group["lr"] = learning_rate * ratio
        return self.update(self.prepare(batch))

    def prepare(self, batch):
        """The micro-batches of a step, each with the teachers' states where there are teachers."""
        share = len(batch.tokens), batch.num_sequences
        parts = batch.split(distributed.micro_batch_sizes(*share, self.micro_batch_size))
        with self.autocast:
            return [self.objective.prepare(part) for part in parts]

    def update(self, parts):
        """The step itself, once its input is there: the same work on the same memory each time."""
        sums = {}
        for part in parts:
            distributed.set_gradient_sync(self.module, part is parts[-1])
            with self.autocast:
                terms = self.module(part)
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


@torch.no_grad()
def dev_cross_entropy(model, shard, starts, sequence_length, autocast):
    """Mean nats per token of the dev chunks that begin at `starts`."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, rank, processes = 0.0, distributed.rank(), distributed.world_size()
    for i in range(0, len(starts), EVAL_BATCH_SIZE * processes):
        mine = starts[i : i + EVAL_BATCH_SIZE * processes][rank::processes]
        some = mine if len(mine) else starts[:1]  # all take part in putting layers together
        tokens, targets = shard.chunks(some, sequence_length)
        with autocast:
            hidden = model.hidden_states(tokens.to(device))
            loss = linear_cross_entropy(hidden, model.head, targets.to(device), 1)[1].item()
        total += loss if len(mine) else 0.0
    model.train(training)
    return sum(distributed.all_gather(total)) / (len(starts) * sequence_length)


# ---- the loop


def fit(objective, config, stream, evaluate, provenance):
    """Trains `objective`, and returns its progress: step, steps, dev cross-entropies, ...

    `objective.prepare(batch)` does what needs no gradient, `objective(batch)` returns a dict of
    tensors, `loss` and whatever else is to be logged; `objective.model` is evaluated and exported,
    and all parameters that require gradients are trained. `stream(step)` is a batch, and says
    `num_chunks`, `num_tokens` and `words` of an epoch; `evaluate(model, autocast)` returns
    {"dev_cross_entropy": ..., whatever else}, and where it returns a "score", the highest chooses
    best.pt; the config is complete (`with_hyperparameters`). "stopped_by" in the result is a signal that
    came, or None. Raises `UserError` for what can be known before.
    """
    compute = choose_compute(config.device, config.precision)
    plan = plan_run(config, stream.num_chunks, stream.words, stream.num_tokens)
    resume.check_start(config, provenance)
    print_plan(plan, config.out, provenance, objective, stream.num_tokens, compute)
    if config.dry_run:
        return resume.new_progress(plan.steps)
    objective.train()
    if config.checkpoint_activations:
        checkpoint_activations(objective.model, compute)
    if config.micro_batch_size == "auto":
        sequences = largest_micro_batch(objective, stream(0), compute, config.shard)
        config = dataclasses.replace(config, micro_batch_size=sequences)
    wrap = distributed.wrap_fsdp if config.shard else distributed.wrap_ddp
    module = wrap(objective, compute.device)
    recipe = config.weight_decay, config.optimizer, config.beta2, config.no_decay
    optimizers = build_optimizer(objective, *recipe)
    train_step = TrainStep(module, optimizers, compute.autocast, config.micro_batch_size, config.clip)
    graphed = should_capture(config.cuda_graph, compute, optimizers, plan.tokens_seen(1))
    schedule = config.learning_rate, config.warmup_steps, config.min_lr_ratio, config.schedule
    with locked(config.out) if distributed.rank() == 0 else contextlib.nullcontext():
        progress = resume.start_or_resume(train_step, config, provenance, plan.steps)
        if resume.is_finished(progress, config.patience):
            return progress
        if config.compile or (config.compile is None and compute.device.type == "cuda"):
            compile_blocks(objective)
        take_step = GraphedStep(train_step) if graphed else train_step
        logger = TrainingLogger(train_step, config, plan, provenance, progress)
        with logger, StopSignal(config.stop_after) as stop:
            for step in range(progress["step"] + 1, plan.steps + 1):
                rate = learning_rate(step - 1, plan.steps, *schedule)
                batch = stream(step - 1).rank_slice(distributed.rank(), distributed.world_size())
                terms = take_step(batch.to(compute.device), rate)
                logger.count(step)
                last = step == plan.steps
                if last or step % config.log_every == 0:
                    logger.log_step(terms, rate)
                if last or plan.evaluates_at(step):
                    logger.evaluate(evaluate)
                    last = resume.is_finished(progress, config.patience)
                stopping = stop.is_requested()
                if last or stopping or step % config.save_every == 0:
                    logger.save()
                if last or stopping:
                    break
        if last:
            logger.log_finished()
        else:
            log(f"stopped after step {step} of {plan.steps}: the same command continues")
    return progress | {"stopped_by": stop.number}


def fit_corpus(objective, config, corpus, name, init_digest=None, teachers=()):
    """`fit` on a corpus's chunks, evaluated on the same dev chunks always. Returns its progress.

    `name` is what checkpoints call the model; `teachers` are [{"name", "digest"}].
    """
    length, device = config.sequence_length, choose_compute(config.device).device
    chunks = (corpus.train, config.batch_size, length, config.seed, config.random_offset)
    stream = prefetch(BatchStream(*chunks, device), device)
    starts = dev_subset(corpus.dev, length, config.eval_sequences)

    def evaluate(model, autocast):
        return {"dev_cross_entropy": dev_cross_entropy(model, corpus.dev, starts, length, autocast)}

    shape, train, dev = objective.model.config, corpus.train.digest, corpus.dev.digest
    digests = {"train_shard": train, "dev_shard": dev, "init_digest": init_digest}
    provenance = resume.Provenance(
        name, models.architecture(shape), shape, corpus.tokenizer, digests, tuple(teachers)
    )
    return fit(objective, config, stream, evaluate, provenance)


def main(argv=None):
    config = models.with_hyperparameters(parse(TrainConfig, __doc__, argv, models.preset_names()))
    distributed.init_distributed(choose_device(config.device))
    corpus = open_corpus(config.data)
    model, name, init_digest = models.initial_model(config, corpus)
    objective = CrossEntropyObjective(model, config.label_smoothing)
    return exit_code(fit_corpus(objective, config, corpus, name, init_digest))


if __name__ == "__main__":
    sys.exit(run_program(main))
