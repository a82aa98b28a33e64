#!/usr/bin/env bash
# A speculator as VERL trains it in its SFT pipeline: on the answers of prompt/response Parquet files, with validation files; saved as
# VERL saves it. Needs pyarrow:  pip install -e ".[parquet]"
#
#   bash scripts/verl_quickstart.sh                         on the base that ships: minutes on two CPU cores
#   bash scripts/verl_quickstart.sh --base.freeze false     base and speculator together
#   CONFIG=train_configs/qwen2.5_0.5b_verl.toml DATA_GEN=0 NPROC=2 bash scripts/verl_quickstart.sh --base.path BASE \
#       --data.path gsm8k/train.parquet --data.val_path gsm8k/test.parquet --eval.prompts none
#
# Variables are taken from the environment; --section.key value goes to the programs and wins. The same command goes on from where
# it was stopped.
set -euo pipefail

DATA_GEN=${DATA_GEN:-1}      # 1: make prompts and responses of Python's standard library: a function's head and docstring, and its body
TRAIN=${TRAIN:-1}            # 1: train
EXPORT=${EXPORT:-1}          # 1: write the folder; with TRAIN=0, of what a run has saved
NPROC=${NPROC:-1}            # processes: GPUs of this machine
CONFIG=${CONFIG:-}           # a recipe; without one, the settings below
OUT=${OUT:-outputs/verl_quickstart}
DATA=${DATA:-${OUT}_data}    # folder of train.parquet, test.parquet and prompts.jsonl
METHOD=${METHOD:-mlp}        # mlp (sum_rnn) or lstm (sum_lstm)
DIMS=${DIMS:-256}            # emb_dim, proj_dim and inner_dim: a number, or widths by level as "128.256"
EPOCHS=${EPOCHS:-1}
TEST_FREQ=${TEST_FREQ:-100}  # steps between validations
BATCH=${BATCH:-4}            # samples in a step
PROMPTS=${PROMPTS:-16}       # on which the speculator is measured
PYTHON=${PYTHON:-python}

keys=(
    --base.path spectitan:pystdlib --data.path "$DATA/train.parquet" --data.val_path "$DATA/test.parquet"
    --data.prompt_key question --data.response_key answer --data.seq_length 256 --eval.prompts "$DATA/prompts.jsonl"
    --speculator.type "$METHOD" --speculator.n_speculator_heads 3 --speculator.scale_input false --speculator.emb_dim "$DIMS"
    --speculator.proj_dim "$DIMS" --speculator.inner_dim "$DIMS" --training.epochs "$EPOCHS" --training.micro_batch_size "$BATCH"
    --optimizer.lr 1e-2 --eval.interval "$TEST_FREQ" --eval.num_prompts "$PROMPTS" --eval.speed_prompts $(((PROMPTS + 3) / 4))
    --compile.enabled false --export.format verl
)
if [ "$NPROC" -gt 1 ]; then keys+=(--parallelism.sharding_strategy fsdp); fi
if [ -n "$CONFIG" ]; then keys=(--job.config_file "$CONFIG"); fi
keys+=(--job.dump_folder "$OUT")

if [ "$DATA_GEN" = 1 ] && [ ! -e "$DATA/prompts.jsonl" ]; then
    mkdir -p "$DATA"
    "$PYTHON" - "$DATA" <<'END'
import ast
import sys
import sysconfig
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

root, rows = Path(sysconfig.get_path("stdlib")), {"train": [], "test": []}
for path in sorted(root.rglob("*.py")):
    file = path.relative_to(root)
    if {"test", "tests", "site-packages", "dist-packages"} & set(file.parts):
        continue
    try:
        source = path.read_text(encoding="utf-8")
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
    except (SyntaxError, UnicodeDecodeError, ValueError):
        continue
    lines = source.splitlines(keepends=True)
    part = "test" if zlib.crc32(str(file).encode()) % 20 == 0 else "train"  # whole files are held out
    for node in functions:
        answer = "".join(lines[node.body[0].end_lineno : node.end_lineno])
        if answer.strip():
            rows[part].append({"question": "".join(lines[node.lineno - 1 : node.body[0].end_lineno]), "answer": answer})
for part, found in rows.items():
    pq.write_table(pa.Table.from_pylist(found), Path(sys.argv[1]) / f"{part}.parquet")
    print(f"{sys.argv[1]}/{part}.parquet: {len(found)} prompts and responses")
END
    "$PYTHON" -m spectitan.prepare "${keys[@]}" "$@" --prepare.num_prompts "$PROMPTS" --eval.prompts "$DATA/prompts.jsonl"
fi

if [ "$TRAIN" = 1 ]; then  # measures and exports at its end
    if [ "$EXPORT" != 1 ]; then keys+=(--export.format none); fi
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m spectitan.train "${keys[@]}" "$@"
elif [ "$EXPORT" = 1 ]; then
    "$PYTHON" -m spectitan.export "${keys[@]}" --speculator.path "$OUT" "$@"
fi
