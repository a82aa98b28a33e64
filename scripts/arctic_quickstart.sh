#!/usr/bin/env bash
# An LSTM speculator as ArcticTraining makes it: the base generates the data, the speculator learns from it, ArcticInference serves it.
#
#   bash scripts/arctic_quickstart.sh                       on the base that ships: minutes on two CPU cores
#   CONFIG=train_configs/llama3.1_8b_arctic.toml SOURCE=chats.jsonl SOURCE_LENGTH=2048 PER_SAMPLE=32 SAMPLES=24000 PROCESSES=8 NPROC=8 \
#       bash scripts/arctic_quickstart.sh --base.path BASE
#
# Variables are taken from the environment; --section.key value goes to the programs and wins. The same command goes on from where
# it was stopped. SOURCE is text, chats (a column "messages") or prompts with responses; see docs/data.md.
set -euo pipefail

DATA_GEN=${DATA_GEN:-1}              # 1: generate training data; 0: it is in DATA already
TRAIN=${TRAIN:-1}                    # 1: train
EXPORT=${EXPORT:-1}                  # 1: write a folder for servers and print the serve command; with TRAIN=0, of what a run has saved
PROCESSES=${PROCESSES:-1}            # that generate, each on a GPU of its own and into a file of its own
NPROC=${NPROC:-1}                    # that train
CONFIG=${CONFIG:-}                   # a recipe; without one, the settings below
OUT=${OUT:-outputs/arctic_quickstart}
DATA=${DATA:-${OUT}_data}            # folder of generated data
SOURCE=${SOURCE:-python:stdlib}      # what prompts are cut from
SOURCE_LENGTH=${SOURCE_LENGTH:-256}  # tokens in a sample of it
PER_SAMPLE=${PER_SAMPLE:-4}          # prompts cut from a sample
SAMPLES=${SAMPLES:-192}              # of SOURCE, for each process
GEN_BATCH=${GEN_BATCH:-8}            # samples whose prompts are continued at once
STEPS=${STEPS:-300}
WIDTH=${WIDTH:-256}
BATCH=${BATCH:-4}                    # prompts in a training step
PROMPTS=${PROMPTS:-16}               # on which the speculator is measured
PYTHON=${PYTHON:-python}

keys=(
    --base.path spectitan:pystdlib --data.on_invalid skip --data.drop_overlap spectitan:pystdlib --data.holdout 0.05 --data.seq_length 320
    --stage2.prompt_length 64 --stage2.seq_length 256 --stage2.temperature 1 --stage2.top_k 10
    --speculator.type lstm --speculator.speculator_width "$WIDTH" --training.num_steps "$STEPS" --training.micro_batch_size "$BATCH"
    --optimizer.lr 1e-2 --optimizer.betas 0.9,0.999 --lr_scheduler.type cosine
    --eval.num_prompts "$PROMPTS" --eval.speed_prompts $(((PROMPTS + 3) / 4)) --compile.enabled false --export.format arctic
)
if [ "$NPROC" -gt 1 ]; then keys+=(--parallelism.sharding_strategy fsdp); fi
if [ -n "$CONFIG" ]; then keys=(--job.config_file "$CONFIG"); fi
keys+=(--job.dump_folder "$OUT")

if [ "$DATA_GEN" = 1 ]; then
    pids=()
    for ((i = 0; i < PROCESSES; i++)); do
        if [ "$PROCESSES" -gt 1 ]; then export CUDA_VISIBLE_DEVICES=$i; fi
        "$PYTHON" -m spectitan.prepare "${keys[@]}" "$@" --data.path "$SOURCE" --data.seq_length "$SOURCE_LENGTH" \
            --training.global_batch_size "$GEN_BATCH" --training.micro_batch_size "$GEN_BATCH" --stage2.batch_size $((GEN_BATCH * PER_SAMPLE)) \
            --prepare.show 0 --prepare.generate "$DATA/$i.jsonl" --prepare.generate_start $((i * SAMPLES)) --prepare.generate_samples "$SAMPLES" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
    if [ "$PROCESSES" -gt 1 ]; then unset CUDA_VISIBLE_DEVICES; fi
fi

keys+=(--data.path "$DATA")
if [ "$TRAIN" = 1 ]; then  # measures and exports at its end
    if [ "$EXPORT" != 1 ]; then keys+=(--export.format none); fi
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m spectitan.train "${keys[@]}" "$@"
elif [ "$EXPORT" = 1 ]; then
    "$PYTHON" -m spectitan.export "${keys[@]}" --speculator.path "$OUT" "$@"
fi
