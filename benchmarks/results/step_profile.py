"""Where the time of one distillation step on a CPU goes, by operator.

    PYTHONPATH=. python benchmarks/results/step_profile.py ours

The variants are those of benchmarks/distill_step.py.
"""

import argparse
import sys

import torch
from torch.profiler import profile

from benchmarks.distill_step import CPU_VARIANTS, build_variant
from training.device import choose_precision

device = torch.device("cpu")
args = argparse.Namespace(teachers="small", batch_size=32, sequence_length=128, steps=1)
args.precision = choose_precision("auto", device)
if sys.argv[1:] and sys.argv[1] not in CPU_VARIANTS:
    sys.exit(f"choose from {', '.join(CPU_VARIANTS)}")
take_step, warm_up = build_variant(args, device, (sys.argv[1:] or ["ours"])[0])
warm_up()
take_step()
with profile() as profiled:
    take_step()
print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
