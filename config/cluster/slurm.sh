#!/bin/bash
# A training run on several nodes of a Slurm cluster, from the folder of this repository:
#   DATASET=datasets/my_task RUN=runs/my_task sbatch config/cluster/slurm.sh [OPTIONS of dit_policy_training.train]
# Five minutes before its time is up it saves a checkpoint, and the job goes back into the queue, as it does when a node
# fails. A job that finds a checkpoint in RUN goes on from there, with the same order of samples and the same noise.
#SBATCH --job-name=dit_policy
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
: "${DATASET:=datasets/my_task}" "${RUN:=runs/my_task}" "${CONFIG:=config/training/large_dataset.yaml}"
# Once, before the job: `. .venv/bin/activate` here, or a module or container of your cluster.

# One task of Slurm is one process of one GPU, so no launcher stands between a signal and the trainer.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE

arguments=(--config="$CONFIG" --dataset_path="$DATASET" --output_dir="$RUN" "$@")
# The newest and not `last`, which a run that was killed within an instant of its first checkpoint has not.
newest=$(find "$RUN/checkpoints" -maxdepth 1 -name '[0-9]*' 2>/dev/null | sort -V | tail -n 1)
if [ -n "$newest" ]; then
    arguments+=(--checkpoint_path="$newest" --finetune=false --overwrite=false) # whatever the run began with
fi

stopped=
trap 'stopped=yes; kill -TERM "$step"' TERM
# shellcheck disable=SC2016  # each task has its own rank
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m dit_policy_training.train "$@"' \
    train "${arguments[@]}" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the waiting, not the training
    wait "$step"
    status=$?
done
if [ -n "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
