#!/bin/bash
# A training run on all GPUs of this machine, from the folder of this repository:
#   DATASET=datasets/my_task RUN=runs/my_task config/cluster/torchrun.sh [OPTIONS of dit_policy_training.train]
# On several machines run it on each, with NODES=2 and HOST=the first one's name:29500. Run again, it goes on where RUN
# stopped. `accelerate launch --num_processes=4 -m dit_policy_training.train ...` does the same on one machine.
set -eu
: "${DATASET:=datasets/my_task}" "${RUN:=runs/my_task}" "${CONFIG:=config/training/large_dataset.yaml}"

arguments=(--config="$CONFIG" --dataset_path="$DATASET" --output_dir="$RUN" "$@")
if [ -e "$RUN/checkpoints/last" ]; then
    arguments+=(--checkpoint_path="$RUN/checkpoints/last")
fi
exec torchrun --nnodes="${NODES:-1}" --nproc_per_node="${PROCESSES:-gpu}" \
    --rdzv_backend=c10d --rdzv_endpoint="${HOST:-localhost:0}" \
    -m dit_policy_training.train "${arguments[@]}"
