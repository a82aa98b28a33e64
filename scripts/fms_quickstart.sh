#!/usr/bin/env bash
# An MLP speculator as fms-fsdp trains it: on text, then on what the base samples after it; measured and exported at the end.
#
#   bash scripts/fms_quickstart.sh                          on the base that ships: minutes on two CPU cores
#   CONFIG=train_configs/llama3.1_8b_fms.toml NPROC=8 bash scripts/fms_quickstart.sh --base.path BASE --data.path TEXT
#
# Variables are taken from the environment; --section.key value goes to the programs and wins. The same command goes on from where
# it was stopped.
set -euo pipefail

TRAIN=${TRAIN:-1}            # 1: train
EXPORT=${EXPORT:-1}          # 1: write a folder for servers and print the serve command; with TRAIN=0, of what a run has saved
NPROC=${NPROC:-1}            # processes: GPUs of this machine
CONFIG=${CONFIG:-}           # a recipe; without one, the settings below
OUT=${OUT:-outputs/fms_quickstart}
STEPS=${STEPS:-300}          # of both stages
STAGE2=${STAGE2:-220}        # first step of stage 2; -1: none
WIDTH=${WIDTH:-256}
BATCH=${BATCH:-4}            # samples in a step
PROMPTS=${PROMPTS:-16}       # on which the speculator is measured
PYTHON=${PYTHON:-python}

keys=(
    --base.path spectitan:pystdlib --data.path python:stdlib --data.on_invalid skip --data.drop_overlap spectitan:pystdlib
    --data.seq_length 256 --data.holdout 0.05 --speculator.type mlp --speculator.speculator_width "$WIDTH"
    --training.num_steps "$STEPS" --training.micro_batch_size "$BATCH" --optimizer.lr 1e-2 --lr_scheduler.type two_stage
    --stage2.start_step "$STAGE2" --stage2.batch_size $((4 * BATCH * NPROC)) --stage2.prompt_length 64 --stage2.seq_length 128
    --eval.num_prompts "$PROMPTS" --eval.speed_prompts $(((PROMPTS + 3) / 4)) --compile.enabled false --export.format mlp_speculator
)
if [ "$NPROC" -gt 1 ]; then keys+=(--parallelism.sharding_strategy fsdp); fi
if [ -n "$CONFIG" ]; then keys=(--job.config_file "$CONFIG"); fi
keys+=(--job.dump_folder "$OUT")

if [ "$TRAIN" = 1 ]; then  # measures and exports at its end
    if [ "$EXPORT" != 1 ]; then keys+=(--export.format none); fi
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m spectitan.train "${keys[@]}" "$@"
elif [ "$EXPORT" = 1 ]; then
    "$PYTHON" -m spectitan.export "${keys[@]}" --speculator.path "$OUT" "$@"
fi
