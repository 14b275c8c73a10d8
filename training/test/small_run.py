"""A training run that takes seconds: a tiny policy on the toy robot's dataset."""

import json
from pathlib import Path

from dit_policy_training.loop.options import OptimizerConfig, SchedulerConfig, TrackingConfig, TrainConfig
from rich.console import Console

from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    FlowMatchingConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)

QUIET = Console(quiet=True)


def small_config(dataset: Path, output_dir: Path, text_model: Path) -> TrainConfig:
    """20 steps of 8 samples."""
    vision = ResNetConfig(
        resize_shape=(16, 16), random_shift=0, stem_channels=8, widths=(8,), num_keypoints=4, norm_groups=4
    )
    return TrainConfig(
        dataset_path=dataset,
        output_dir=output_dir,
        batch_size=8,
        train_steps=20,
        save_freq=1000,
        log_freq=5,
        device="cpu",
        ema_decay=0.9,
        num_workers=0,
        optimizer=OptimizerConfig(lr=3e-3),
        scheduler=SchedulerConfig(warmup_steps=5),
        tracking=TrackingConfig(pictures=False),
        policy=PolicyConfig(
            n_obs_steps=2,
            horizon=8,
            n_action_steps=4,
            action_mode="relative",
            observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(str(text_model))),
            transformer=TransformerConfig(hidden_dim=16, num_layers=1, num_heads=2, timestep_embed_dim=16, dropout=0.0),
            objective=FlowMatchingConfig(denoising_steps=4),
        ),
    )


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
