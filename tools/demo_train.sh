#!/usr/bin/env bash
# The demo's checkpoint from nothing: expert, bags, dataset, training, evaluation. Run by `make demo-train`.
# SEED=1 make demo-train trains with another seed. The result is outputs/demo-train/seed$SEED/checkpoints/last.
set -eu
seed=${SEED:-0}
out=outputs/demo-train

started=$SECONDS
stage() { printf '\n== %s (after %d s)\n' "$1" "$((SECONDS - started))"; }

stage "1/5 the expert is recorded into bags"
python -m dit_policy_ros.sim.record --output="$out/bags" --episodes=150 --seed=1000 --overwrite

stage "2/5 the bags become a dataset"
# The simulated controller was told to go on from its last reference, as chunks need; so is the one that is recomputed here.
python -m dit_policy_training.convert --bags="$out/bags" --embodiment=config/embodiments/sim_arm.yaml \
    --output="$out/dataset" --overwrite=true --controller.interpolate_from_desired_state=true

stage "3/5 a small text tower with the task's words"
python -m dit_policy_ros.policy.tiny_clip --output="$out/tiny_clip"

stage "4/5 training"
python -m dit_policy_training.train --config=config/training/demo.yaml --dataset_path="$out/dataset" \
    --output_dir="$out/seed$seed" --overwrite=true --seed="$seed"

stage "5/5 evaluation: unseen scenes, node and simulator over DDS, real time"
python -m dit_policy_ros.nodes.demo --checkpoint="$out/seed$seed/checkpoints/last" --output="$out/seed$seed/demo"

stage "done"
