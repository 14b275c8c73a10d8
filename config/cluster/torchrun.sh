#!/bin/bash
# A training run on all GPUs of this machine, from the folder of this repository:
#   DATASET=datasets/my_task RUN=runs/my_task config/cluster/torchrun.sh [OPTIONS of dit_policy_training.train]
# On several machines run it on each, with NODES=2 and HOST=the first one's name:29500. Run again, it goes on where RUN
# stopped. `accelerate launch --num_processes=4 -m dit_policy_training.train ...` does the same on one machine.
# Without GPUs, to try it: PROCESSES=2 before it and --device=cpu behind it.
set -eu
: "${DATASET:=datasets/my_task}" "${RUN:=runs/my_task}" "${CONFIG:=config/training/large_dataset.yaml}"

arguments=(--config="$CONFIG" --dataset_path="$DATASET" --output_dir="$RUN" "$@")
# The newest and not `last`, which a run that was killed within an instant of its first checkpoint has not.
newest=$(find "$RUN/checkpoints" -maxdepth 1 -name '[0-9]*' 2>/dev/null | sort -V | tail -n 1)
if [ -n "$newest" ]; then
    arguments+=(--checkpoint_path="$newest" --finetune=false --overwrite=false) # whatever the run began with
fi
exec torchrun --nnodes="${NODES:-1}" --nproc_per_node="${PROCESSES:-gpu}" \
    --rdzv_backend=c10d --rdzv_endpoint="${HOST:-localhost:0}" \
    -m dit_policy_training.train "${arguments[@]}"
