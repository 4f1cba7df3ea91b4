#!/usr/bin/env bash
# Is pretrained/vit-mae-tiny worth starting from? Fine-tuning from it and from random weights of the same architecture.
# Rule, set before the runs: 3 seeds an arm (of the random weights, too), the same 800 steps of 32 images at 5e-4, no
# choice of anything by the test split, accuracy at the last step, every run's metrics.json kept.
#     bash benchmark/worth_starting_from.sh path/to/flowers102_64px     (a folder that datasets.load_dataset reads)
set -euo pipefail
data=${1:?a folder with train and test}
here=$(dirname "$0")
for seed in 1 2 3; do
  python "$here/../pretrained/make_vit_mae_tiny.py" --images "$data"/train*.parquet --steps 0 --seed $seed --out runs/random_$seed
  for arm in vit-mae-tiny random; do
    model=$([ $arm = random ] && echo runs/random_$seed || echo pretrained/vit-mae-tiny)
    python "$here/../finetune.py" --dataset "$data" --model "$model" --seed $seed --steps 800 --batch-size 32 \
      --learning-rate 5e-4 --run-dir runs/worth/${arm}_$seed
  done
done
python "$here/table.py" runs/worth/*/metrics.json
