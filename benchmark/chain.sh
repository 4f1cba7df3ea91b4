#!/usr/bin/env bash
# The chain on an embedded data set: does further pre-training help, and does self-distillation? Arms: fine-tuning from the
# starting weights, from round 0 (further pre-training) and from round 1 (self-distillation), all with the default recipe.
# Rule, set before the runs: 3 seeds, each with its own pre-training and its own labelled samples, scores at the last step,
# every run's metrics.json kept.
#     bash benchmark/chain.sh mnist5k          or docstrings
set -euo pipefail
data=${1:?mnist5k or docstrings} here=$(dirname "$0")/..
script=$([ "$data" = mnist5k ] && echo self_distill_vit || echo self_distill_roberta)
for seed in 1 2 3; do
  python "$here/$script.py" --dataset $data --seed $seed --run-dir runs/chain_$data/pretraining_$seed
  for arm in start round_0 round_1; do
    model=$([ $arm = start ] && echo "" || echo "--model runs/chain_$data/pretraining_$seed/$arm")
    python "$here/finetune.py" --dataset $data --seed $seed $model --run-dir runs/chain_$data/tuned/${arm}_$seed
  done
done
python "$here/benchmark/table.py" runs/chain_$data/tuned/{start,round_0,round_1}_*/metrics.json
