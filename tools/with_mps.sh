#!/usr/bin/env bash
# Runs a command whose ranks may share a GPU: under an MPS daemon of its own, stopped again at the end. Without MPS the
# ranks' kernels take turns on the card instead of running side by side, and a barrier takes milliseconds.
#
#   tools/with_mps.sh python3 -m pytest --device cuda
set -euo pipefail

# Where ranks share a card NVLink multicast cannot be used anyway; NCCL and torch are told not to try.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1

command -v nvidia-cuda-mps-control >/dev/null || exec "$@"
[[ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ]] && exec "$@" # the caller has a daemon already

folder=$(mktemp -d)
export CUDA_MPS_PIPE_DIRECTORY=$folder/pipe CUDA_MPS_LOG_DIRECTORY=$folder/log
mkdir "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
# The daemon numbers the GPUs that it sees anew: it sees all, and the command those that it was given.
env -u CUDA_VISIBLE_DEVICES nvidia-cuda-mps-control -d
trap 'echo quit | timeout 30 nvidia-cuda-mps-control || true; rm -rf "$folder"' EXIT
"$@"
