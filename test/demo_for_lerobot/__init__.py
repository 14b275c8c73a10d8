"""The demo's policy as a plugin of lerobot-train, which then trains the very architecture that our trainer does.

`lerobot-train --policy.discover_packages_path=demo_for_lerobot --policy.type=demo_dit ...`. LeRobot finds the policy's
class and its processors by their names, in the module of the configuration. The loss is our policy's; batches, order,
optimizer, schedule, steps and what is saved are LeRobot's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
import torch
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.policies import new_policy
from lerobot.configs.policies import PreTrainedConfig
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import DiffuserSchedulerConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import make_default_policy_processor_steps, make_policy_processor_pipelines
from torch import Tensor

from dit_policy_ros.policy.modeling import MultitaskDiTPolicy


def recipe(file: str, dataset: str) -> TrainConfig:
    """The settings of a preset of ours, for a dataset."""
    arguments = [f"--config_path={file}", f"--dataset_path={dataset}", "--output_dir=unused"]
    return draccus.parse(TrainConfig, args=arguments)


def fresh_policy(config: TrainConfig) -> MultitaskDiTPolicy:
    """The policy that our trainer would begin with, but for the seed."""
    assert config.dataset_path is not None
    table = load_table(Path(config.dataset_path))
    return new_policy(config.policy, Windows(table, config.policy.n_obs_steps, config.policy.horizon))


@PreTrainedConfig.register_subclass("demo_dit")
@dataclass
class DemoDitConfig(PreTrainedConfig):
    """Both are needed; LeRobot wants defaults."""

    recipe: str = ""  # YAML of config/training
    dataset: str = ""  # folder of the dataset
    normalization_mapping: dict[str, str] = field(default_factory=dict)  # LeRobot's own steps look at it

    @property
    def settings(self) -> TrainConfig:
        """The preset's."""
        return recipe(self.recipe, self.dataset)

    @property
    def observation_delta_indices(self) -> list[int]:
        """The observations a policy sees, relative to the newest."""
        return list(range(1 - self.settings.policy.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """The steps of a chunk, relative to the newest observation."""
        policy = self.settings.policy
        return list(range(1 - policy.n_obs_steps, 1 - policy.n_obs_steps + policy.horizon))

    @property
    def reward_delta_indices(self) -> None:
        """None."""
        return

    def get_optimizer_preset(self) -> AdamWConfig:
        """The preset's optimizer by LeRobot."""
        ours = self.settings.optimizer
        return AdamWConfig(
            lr=ours.lr,
            betas=ours.betas,
            eps=ours.eps,
            weight_decay=ours.weight_decay,
            grad_clip_norm=ours.grad_clip,
        )

    def get_scheduler_preset(self) -> DiffuserSchedulerConfig:
        """The preset's schedule by LeRobot."""
        return DiffuserSchedulerConfig(name="cosine", num_warmup_steps=self.settings.scheduler.warmup_steps)

    def validate_features(self) -> None:
        """Our policy looks at them itself."""


class DemoDitPolicy(PreTrainedPolicy):
    """The demo's policy in LeRobot's form; it is trained only."""

    config_class = DemoDitConfig
    name = "demo_dit"

    def __init__(self, config: DemoDitConfig, **unused: Any):
        super().__init__(config)
        self.policy = fresh_policy(config.settings)

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Groups for the optimizer, as our trainer's."""
        return self.policy.parameter_groups(self.config.settings.optimizer.lr)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, None]:
        """The loss of a batch of LeRobot's, whose pictures are floats in [0, 1] made of the bytes of a video."""
        steps, features = self.policy.config.n_obs_steps, self.policy.config.input_features
        # Of a single step LeRobot leaves out the pictures' dimension.
        pictures = {key: batch[key].reshape(-1, steps, *features[key].shape) for key in self.policy.config.cameras}
        pictures = {key: (picture * 255).round().to(torch.uint8) for key, picture in pictures.items()}
        return self.policy.loss({**batch, **pictures}), None

    def reset(self) -> None:
        """Nothing is kept."""

    def predict_action_chunk(self, batch: dict[str, Any], **unused: Any) -> Tensor:
        """Not here: what was trained runs in our node."""
        raise NotImplementedError

    def select_action(self, batch: dict[str, Any], **unused: Any) -> Tensor:
        """Not here: what was trained runs in our node."""
        raise NotImplementedError


def make_demo_dit_pre_post_processors(config: DemoDitConfig, dataset_stats: Any = None) -> Any:
    """The batch to the device; our policy normalises by itself."""
    steps = make_default_policy_processor_steps(config, dataset_stats, normalizer_device=config.device)
    before = [steps.rename_observations, steps.add_batch_dim, steps.to_device]
    return make_policy_processor_pipelines(input_steps=before, output_steps=[steps.to_cpu])
