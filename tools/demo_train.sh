#!/usr/bin/env bash
# Makes the demo's checkpoint from nothing, and judges it as the demo does; only one that passes takes the old one's place.
# Arguments go to the training, such as --seed=1. EPISODES is the number of expert episodes.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=outputs/demo-train

part() {
    echo
    echo "== $1 ($((SECONDS / 60)) min $((SECONDS % 60)) s since the start)"
    shift
    "$@"
}

mkdir -p "$work"
part "Expert: episodes recorded as bags" \
    python -m dit_policy_ros.sim.record --output="$work/bags" --episodes="${EPISODES:-150}" --overwrite
# The controller as the simulator's is; 4:4:4, so that the small blocks keep their colour.
part "Dataset: bags converted" \
    python -m dit_policy_training.convert --bags="$work/bags" --embodiment=config/embodiments/sim_arm.yaml \
    --output="$work/dataset" --overwrite=true --controller.interpolate_from_desired_state=true \
    --video.codec=h264 --video.pix_fmt=yuv444p --video.crf=18 --video.preset=superfast
part "Words: a CLIP text tower" \
    python -m dit_policy_ros.policy.tiny_clip --output="$work/tiny_clip"
part "Policy: training" \
    python -m dit_policy_training.train --config_path=config/training/demo.yaml --dataset_path="$work/dataset" \
    --output_dir="$work/train" --overwrite=true "$@"
part "Evaluation: 20 unseen episodes" \
    python -m dit_policy_ros.nodes.demo --checkpoint="$work/train/checkpoints/last" --output="$work/evaluation"

rm -rf checkpoints/demo
mkdir -p checkpoints
cp -rL "$work/train/checkpoints/last" checkpoints/demo
rm -rf checkpoints/demo/training # what would continue the run, larger than the policy
echo "checkpoints/demo: new, after $((SECONDS / 60)) min $((SECONDS % 60)) s, $(du -sh checkpoints/demo | cut -f1)"
