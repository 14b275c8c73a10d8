"""`make bench-memory`: what training takes of a GPU's memory, by preset: weights, their moments, what a sample adds.

Counted, not estimated: the bytes that autograd keeps for the backward pass of one loss, for two batch sizes, whose
difference is a sample's. They are the same on any device, so that no GPU is needed. Writes outputs/bench/memory.json.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_report import Row, publish
from dit_policy_training import cli
from dit_policy_training.loop.options import TrainConfig

from dit_policy_ros.policy.configuration import ClipTextConfig, Feature, PolicyConfig, ViTConfig
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import DEMO_INSTRUCTIONS, make_tokenizer

PRESETS = ("small_dataset", "default", "large_dataset", "tri_lbm")
JOINTS, PICTURE = 7, (480, 640)
BATCHES = (1, 3)
BYTES_A_TRAINED_WEIGHT = 4 * 5  # weight, gradient, two moments, moving average
GB = 1e9


def main() -> int:
    """All presets with two cameras; 0."""
    return publish("memory", [row for preset in PRESETS for row in rows(preset)])


def rows(preset: str) -> list[Row]:
    """A preset's fixed bytes, a sample's in both precisions, and what its batch size comes to."""
    config = cli.parse(TrainConfig, [f"--config=config/training/{preset}.yaml", "--output_dir=unused"])
    policy = MultitaskDiTPolicy(of_random_weights(config.policy), statistics(), make_tokenizer(DEMO_INSTRUCTIONS))
    trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in policy.parameters() if not weight.requires_grad)
    fixed = (BYTES_A_TRAINED_WEIGHT * trained + 4 * frozen) / GB
    weights = f"{trained / 1e6:.0f} M trained weights, {frozen / 1e6:.0f} M frozen"
    found = [row(preset, "whatever the batch", fixed, weights)]
    for name, is_half in (("fp32", False), ("bf16", True)):
        kept = [kept_bytes(policy, batch_of(policy.config, size), is_half) / GB for size in BATCHES]
        sample = (kept[1] - kept[0]) / (BATCHES[1] - BATCHES[0])
        once = kept[0] - BATCHES[0] * sample  # weights cast to half precision
        found.append(row(preset, f"a sample, {name}", sample, "kept for the backward pass"))
        whole = fixed + once + config.batch_size * sample
        found.append(row(preset, f"batch {config.batch_size}, {name}", whole, "the sum of both"))
    return found


def row(preset: str, name: str, gigabytes: float, how: str) -> Row:
    """A figure without a bar."""
    cameras = f"two cameras of {PICTURE[1]}x{PICTURE[0]}"
    return {
        "name": f"{preset}: {name}",
        "value": float(f"{gigabytes:.3g}"),
        "unit": "GB",
        "bar": None,
        "holds": True,
        "how": f"{cameras}; {how}",
    }


def of_random_weights(config: PolicyConfig) -> PolicyConfig:
    """The preset with CLIP ViT-B/16 towers of random weights, which take as much as the trained ones, and features."""
    vision, images = config.observation_encoder.vision, ("observation.images.front", "observation.images.wrist")
    assert isinstance(vision, ViTConfig)
    encoder = replace(
        config.observation_encoder,
        vision=replace(vision, backbone_config={"patch_size": 16}),
        text=ClipTextConfig(model_config={}),
    )
    return replace(
        config,
        observation_encoder=encoder,
        action_state_indices=list(range(JOINTS)) if config.action_mode == "relative" else None,
        input_features={key: Feature("VISUAL", (3, *PICTURE)) for key in images}
        | {"observation.state": Feature("STATE", (JOINTS,))},
        output_features={"action": Feature("ACTION", (JOINTS,))},
    )


def statistics() -> dict[str, dict[str, list[float]]]:
    """Of data in [-1, 1]."""
    one = {"min": [-1.0] * JOINTS, "max": [1.0] * JOINTS, "mean": [0.0] * JOINTS, "std": [1.0] * JOINTS}
    return {"observation.state": one, "action": one}


def batch_of(config: PolicyConfig, size: int) -> dict[str, Any]:
    """A batch as the trainer makes it: pictures scaled already, uint8."""
    pictures = (size, config.n_obs_steps, 3, 256, 341)
    return {key: torch.zeros(pictures, dtype=torch.uint8) for key in config.cameras} | {
        "observation.state": torch.zeros(size, config.n_obs_steps, JOINTS),
        "action": torch.zeros(size, config.horizon, JOINTS),
        "action_is_pad": torch.zeros(size, config.horizon, dtype=torch.bool),
        "task": [DEMO_INSTRUCTIONS[0]] * size,
    }


def kept_bytes(policy: MultitaskDiTPolicy, batch: dict[str, Any], is_half: bool) -> int:
    """Bytes of all tensors kept for the backward pass that are not the weights themselves, each storage once."""
    own = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no storage is freed and its address used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        policy.train().loss(batch)
    return sum(kept.values())


if __name__ == "__main__":
    if not Path("config/training").is_dir():
        raise SystemExit("run it from the repository's root: make bench-memory")
    sys.exit(main())
