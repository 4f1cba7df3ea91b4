#!/usr/bin/env bash
# Are the embedded models worth starting from? Fine-tuning from them and from random weights of the same architecture.
# Rule, set before the runs: 3 seeds an arm (of the random weights, too), the same steps for both, no choice of anything by the
# test split, scores at the last step, every run's metrics.json kept.
#     bash benchmark/worth_starting_from.sh images path/to/flowers102_64px     2,000 steps of 32 at 5e-4; accuracy
#     bash benchmark/worth_starting_from.sh texts path/to/scierc               10 epochs of 32 at 5e-4; macro-F1
# Both paths are folders that datasets.load_dataset reads. The image recipe, the same for both arms, had the best accuracy on the
# validation split of Flowers among those that were run, all in results/worth_starting_from/choice.
set -euo pipefail
kind=${1:?images or texts} data=${2:?a folder with train and test} here=$(dirname "$0")/..
for seed in 1 2 3; do
  if [ "$kind" = images ]; then
    tiny=vit-mae-tiny steps="--steps 2000"
    python "$here/pretrained/make_vit_mae_tiny.py" --images "$data"/train*.parquet --steps 0 --seed $seed --out runs/random_vit_$seed
    random=runs/random_vit_$seed
  else
    tiny=roberta-tiny steps="--epochs 10" random=runs/random_roberta_$seed
    python - "$here/pretrained/roberta-tiny" $random $seed <<'PYTHON'
import sys, torch, transformers as t
torch.manual_seed(int(sys.argv[3]))
t.AutoModelForMaskedLM.from_config(t.AutoConfig.from_pretrained(sys.argv[1])).save_pretrained(sys.argv[2])
t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
PYTHON
  fi
  for arm in $tiny random; do
    model=$([ $arm = random ] && echo $random || echo "$here/pretrained/$tiny")
    python "$here/finetune.py" --dataset "$data" --model "$model" --seed $seed $steps --batch-size 32 --learning-rate 5e-4 \
      --run-dir "runs/worth_$kind/${arm}_$seed"
  done
done
python "$here/benchmark/table.py" runs/worth_$kind/*/metrics.json
