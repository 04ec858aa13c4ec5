"""The benchmarks in one go: what is committed under benchmarks/results/ comes from here.

    python benchmarks/suite.py cpu                        under 20 minutes on two cores
    python benchmarks/suite.py cpu-fp32                   ours without bf16, some minutes more
    python benchmarks/suite.py gpu --out results          all phases, one after the other
    python benchmarks/suite.py gpu --phase steps          one of them: each ends within 8 minutes
    python benchmarks/suite.py rehearsal                  the GPU's phases on a CPU with tiny models

Each phase writes OUT/KIND-PHASE.json, and OUT/KIND.md collects what was printed by all that are
there, each under the command that printed it. A phase that fails or takes too long is reported and
does not stop the others.
"""

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASE_SECONDS = 480

PHASES = {
    "cpu": {
        "steps": "benchmarks/distill_step.py --json",
        "loss": "benchmarks/loss.py --rounds 3 --json",
        "training": "benchmarks/train_step.py --rounds 3 --json",
        "scaling": "benchmarks/scaling.py --json",
        "evaluation": "benchmarks/evaluation.py --json",
        "numerics": "benchmarks/numerics.py --json",
    },
    "cpu-fp32": {  # as on a processor that does not multiply bf16 natively
        "steps": "benchmarks/distill_step.py --precision fp32 --variants huggingface ours_eager "
        "ours --json",
    },
    "gpu": {
        "tests": "-m pytest -m gpu -p no:cacheprovider",
        "steps": "benchmarks/distill_step.py --device cuda --teachers paper --variants huggingface "
        "huggingface_compiled ours ours_cached --json",
        "steps-graph": "benchmarks/distill_step.py --device cuda --teachers paper --variants ours "
        "ours_graph ours_cached ours_cached_graph --json",
        "steps-small": "benchmarks/distill_step.py --device cuda --variants huggingface "
        "huggingface_compiled ours ours_cached --json",
        "steps-small-graph": "benchmarks/distill_step.py --device cuda --variants ours ours_graph "
        "ours_cached ours_cached_graph --json",
        "training-gpt2": "benchmarks/train_step.py --device cuda --models gpt2-705m --json",
        "training-llama": "benchmarks/train_step.py --device cuda --models llama-360m --json",
        "training-student": "benchmarks/train_step.py --device cuda --models llama-58m "
        "--batch-size 32 --json",
        "loss": "benchmarks/loss.py --device cuda --rounds 3 --json",
        "numerics": "benchmarks/numerics.py --device cuda --json",
        "evaluation": "benchmarks/evaluation.py --device cuda --model llama-58m --json",
    },
    "rehearsal": {
        "tests": "-m pytest -m gpu -p no:cacheprovider",
        "steps": "benchmarks/distill_step.py --device cpu --teachers tiny --rounds 1 --json",
        "training": "benchmarks/train_step.py --device cpu --models llama-tiny --rounds 1 --json",
        "loss": "benchmarks/loss.py --device cpu --tokens 256 --rounds 1 --json",
        "numerics": "benchmarks/numerics.py --device cpu --json",
        "evaluation": "benchmarks/evaluation.py --device cpu --model llama-tiny --sentences 200 "
        "--json",
    },
}


def run_phase(kind, name, out):
    """Runs one phase; its JSON if it has one, and an entry for the page."""
    arguments = shlex.split(PHASES[kind][name])
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, timeout=PHASE_SECONDS, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        printed, failed = done.stdout, done.returncode
        if failed:
            printed += f"exit {failed}: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired as stopped:
        printed, failed = (stopped.stdout or b"").decode(errors="replace"), "timeout"
        printed += f"stopped after {PHASE_SECONDS} seconds"
    lines = printed.strip().splitlines()
    result = {"command": f"python {shlex.join(arguments)}", "failed": bool(failed)}
    result["date"] = str(datetime.date.today())
    if "--json" in arguments and not failed:
        result |= json.loads(lines.pop())
    result["printed"] = [line.rstrip() for line in lines]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{kind}-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines), f"\n({time.monotonic() - started:.0f} seconds)", flush=True)
    return not failed


def write_page(kind, out):
    """OUT/KIND.md, of all phases whose JSON is there."""
    lines = [f"# Benchmarks: {kind}", ""]
    for name in PHASES[kind]:
        path = out / f"{kind}-{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            lines += [f"## {name}", "", f"`{result['command']}`, {result['date']}", ""]
            lines += ["```", *result["printed"], "```", ""]
    (out / f"{kind}.md").write_text("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=PHASES)
    parser.add_argument(
        "--phase", action="append", help="only this one; may be given several times"
    )
    parser.add_argument("--out", default="benchmarks/results", metavar="DIR")
    args = parser.parse_args()
    names = args.phase or list(PHASES[args.kind])
    unknown = set(names) - PHASES[args.kind].keys()
    if unknown:
        parser.error(f"no phase {min(unknown)}: choose from {', '.join(PHASES[args.kind])}")
    succeeded = [run_phase(args.kind, name, Path(args.out)) for name in names]
    write_page(args.kind, Path(args.out))
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
