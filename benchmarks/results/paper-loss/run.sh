#!/usr/bin/env bash
# The trials and seeds of paper-loss.md; the same command continues where it was stopped.
#
#   bash run.sh STATE TRAIN_DIR DEV_DIR PAIRS_DIR...
#
# STATE keeps text, shards and checkpoints. Results go beside this script, or into $RESULTS.
# Two processes of one thread each, at the lowest priority.
set -euo pipefail
state=$1 train=$2 dev=$3 pairs=("${@:4}")
here=$(cd "$(dirname "$0")" && pwd)
results=${RESULTS:-$here} python=${PYTHON:-.venv/bin/python}
cd "$here/../../.."
echo 19 > /proc/self/autogroup 2> /dev/null || true # nice alone does not count between sessions
export OMP_NUM_THREADS=1

tune() { # tune MODEL...: seed 100, scored on the validation half alone
  nice -n 19 "$python" reproduce.py --recipe "$here/trials.json" --tune --first-seed 100 \
    --data "$state/data" --out "$state/tune" --results "$results/tuning" --device cpu --models "$@"
}

[ -e "$state/data/made.json" ] ||
  "$python" reproduce.py --recipe ratios --train "$train" --dev "$dev" --out "$state" --dry-run

{ tune control control-36-epochs control-48-epochs control-decay-0.5 control-dropout-0 control-48-epochs-offset; } &
{ tune llama-teacher llama-dropout-0.2-16-epochs llama-offset-16-epochs gpt2-teacher gpt2-offset-16-epochs; } &
wait
{ tune token-36-epochs; } &
{ tune paper-48-epochs; } &
wait

nice -n 19 "$python" reproduce.py --recipe ratios --data "$state/data" --out "$state/seeds" --results "$results" \
  --pairs "${pairs[@]}" --first-seed 3 --seeds 5 --jobs 2 --device cpu
