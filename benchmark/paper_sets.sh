#!/usr/bin/env bash
# The paper's main comparison on two of its data sets, small: tiny models, a CPU, runs shorter than the paper's.
#   start      fine-tuning from the tiny pre-trained model
#   round_0    from the same model after further pre-training on the train split, without labels
#   round_1    from the self-distilled one
#   no_distillation  round 1 with --distill-coef 0 and the same teacher, which is round 0 with other draws, so the two show what
#              chance does. Added when the arms above were known: of two seeds of the texts, of all three of the images
#   on_the_mean  round 1 with the same teacher and the distance on the mean over tokens or patches. Added when all the arms above
#              were known but the images' no_distillation
#   recadam, mars, mars_tight, r3f  the baselines, from the tiny model. Added when the arms above were known. RecAdam as in the
#              embedded recipes of this learning rate: strength 500, midpoint at 4 % of the some 1,000 steps. MARS with its default
#              radius and, as in study.sh, with 1. R3F with its defaults
# The fine-tunings in results/paper_sets are from before commit efbad75, which gave fine-tuning draws of its own, but for those of
# */redrawn: the same arms, seeds, commands and pre-trained models again. Rule, set before those runs: all are kept, both columns
# stand side by side, the README shows the new one. Run in the order of the table, images round 0, round 1 and start first, the
# baselines last.
# Of the images, seeds 4 and 5 of start, round_0, round_1 and no_distillation were added (SEEDS="4 5") when all else was known: with three seeds
# round_1 was 0.4 points above round_0 with each, too little to believe. Rule, set before they were run: both are kept, whatever they say.
# The same seeds and arms of the texts were added last, when all else was known, so that both sets have five. The same rule.
# Rule, set before the runs: 3 seeds, each with its own pre-training and its own fine-tuning; the learning rate of the embedded
# recipes (5e-4) for every stage and arm, nothing tuned, nothing left out; the score is that on the test split at the last step;
# every run's metrics.json is kept. Run again after an interruption, it goes on where it was.
#     bash benchmark/paper_sets.sh images path/to/flowers102_64px   1,000 steps of 64 a round, then 1,000 of 32; accuracy
#     bash benchmark/paper_sets.sh texts path/to/scierc             20 epochs of 32 a round, then 10; macro-F1
# Both paths are folders with train and test that datasets.load_dataset reads.
set -euo pipefail
kind=${1:?images or texts} data=${2:?a folder with train and test} here=$(dirname "$0")/.. runs=runs/paper_sets_$1
if [ "$kind" = images ]; then
  script=self_distill_vit model=$here/pretrained/vit-mae-tiny round="--steps 1000 --batch-size 64" tuning="--steps 1000"
else
  script=self_distill_roberta model=$here/pretrained/roberta-tiny round="--epochs 20 --batch-size 32" tuning="--epochs 10"
fi

run() {  # script, name, other flags
  [ -e "$runs/$2/metrics.json" ] || python "$here/$1.py" --dataset "$data" --seed "$seed" --run-dir "$runs/$2" --resume \
    --learning-rate 5e-4 --save-every 200 --eval-every 250 --log-every 20 "${@:3}" < /dev/null
}
for seed in ${SEEDS:-1 2 3}; do
  run $script "pretraining/rounds_$seed" --model "$model" $round
  for start in start round_0 round_1; do
    from=$([ $start = start ] && echo "$model" || echo "$runs/pretraining/rounds_$seed/$start")
    run finetune "tuned/${start}_$seed" --model "$from" --batch-size 32 $tuning
  done
done
while read -r arm flags; do
  for seed in ${SEEDS:-1 2 3}; do
    run finetune "tuned/${arm}_$seed" --model "$model" --batch-size 32 $tuning $flags
  done
done <<'BASELINES'
recadam --method recadam --recadam-strength 500 --recadam-midpoint 40
mars_tight --method mars --mars-gamma 1 --mars-head-gamma 1
r3f --method r3f
mars --method mars
BASELINES
while read -r arm flags; do
  for seed in ${SEEDS:-1 2 3}; do
    run $script "pretraining/${arm}_$seed" --model "$model" $round --teacher "$runs/pretraining/rounds_$seed/round_0" $flags
    run finetune "tuned/${arm}_$seed" --model "$runs/pretraining/${arm}_$seed/model" --batch-size 32 $tuning
  done
done <<'ARMS'
no_distillation --distill-coef 0
on_the_mean --representation mean
ARMS
python "$here/benchmark/table.py" "$runs"/tuned/{start,recadam,mars,mars_tight,r3f,round_0,round_1,no_distillation,on_the_mean}_*/metrics.json
