"""Checkpoints for the tests of judging: small, untrained, of the toy robot; what they predict is no matter."""

from dataclasses import replace
from pathlib import Path

import torch
from dit_policy_training.data.statistics import stats
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows

from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    DiffusionConfig,
    FlowMatchingConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip


def toy_checkpoint(
    dataset: Path, folder: Path, seed: int = 0, objective: str = "flow_matching", **changes: float
) -> Path:
    """A checkpoint folder whose weights are random, with the dataset's own statistics and embodiment."""
    table = load_table(dataset)
    clip = folder.with_name(f"{folder.name}_clip")
    make_tiny_clip(clip, table.tasks, hidden_size=16, num_layers=1)
    vision = ResNetConfig(
        resize_shape=(16, 16), random_shift=0, stem_channels=8, widths=(8,), num_keypoints=4, norm_groups=4
    )
    config = PolicyConfig(
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        action_mode="relative",
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(str(clip))),
        transformer=TransformerConfig(hidden_dim=16, num_layers=1, num_heads=2, timestep_embed_dim=16, dropout=0.0),
        objective=FlowMatchingConfig(denoising_steps=4) if objective == "flow_matching" else DiffusionConfig(),
        input_features=table.input_features,
        output_features=table.output_features,
        action_state_indices=table.action_state_indices,
        tasks=table.tasks,
    )
    config = replace(config, **changes)
    torch.manual_seed(seed)
    policy = MultitaskDiTPolicy(config, stats(Windows(table, 2, config.horizon), "relative"))
    with torch.no_grad():
        for name, weight in policy.noise_predictor.named_parameters():
            if weight.abs().max() == 0 and "bias" not in name:  # adaLN starts at zero: nothing would be listened to
                weight.normal_(0.0, 0.3)
    assert table.embodiment is not None
    save_checkpoint(folder, policy, table.embodiment.to_yaml(), "made by a test")
    return folder
