"""The Multitask DiT policy: observations and an instruction in, a chunk of actions out.

After "A Careful Examination of Large Behavior Models" (arXiv 2507.05331) and LeRobot's `multi_task_dit`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import ACTION, ACTION_IS_PAD, STATE, TASK, PolicyConfig
from .encoders import ObservationEncoder
from .normalization import Normalizer, Stats, stats_to_lists
from .objectives import make_objective, masked_mse
from .sampling import draw_noise, sample
from .transformer import DiffusionTransformer


class MultitaskDiTPolicy(nn.Module):
    """A policy with everything it needs to act: encoders, transformer, objective, and its data's statistics.

    A batch maps feature keys to tensors or arrays: `observation.images.<camera>` (B, n_obs, 3, H, W) uint8
    (or float in [0, 1]), `observation.state` (B, n_obs, S), both earliest first; `task`: B instructions.
    Training adds `action` (B, horizon, A), absolute, in units, and `action_is_pad` (B, horizon) bool. No
    batch is ever changed.
    """

    def __init__(self, config: PolicyConfig, stats: Stats, tokenizer: Any | None = None):
        """`stats` are the dataset's; with relative actions stats["action"] are those of the differences.

        The tokenizer comes from text.model unless given. Raises ConfigurationError, StatsError.
        """
        super().__init__()
        config.validate()
        self.config = config
        self.stats = stats_to_lists(stats)
        modes = config.normalization_mapping
        self.state_normalizer = Normalizer(STATE, modes["STATE"], config.state_dim, stats)
        self.action_normalizer = Normalizer(ACTION, modes["ACTION"], config.action_dim, stats)
        self.observation_encoder = ObservationEncoder(config, tokenizer)
        self.noise_predictor = DiffusionTransformer(
            config.transformer, config.action_dim, config.horizon, self.observation_encoder.conditioning_dim
        )
        self.objective = make_objective(config.objective)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.noise_predictor.output_proj.weight.device

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The objective's loss, a scalar, on fresh noise and timesteps.

        In training mode pictures are cut at random and `state_noise` is added; in evaluation mode neither.
        """
        config = self.config
        conditioning = self.encode(batch)
        count = len(conditioning)
        actions = self._tensor(batch, ACTION, (count, config.horizon, config.action_dim)).float()
        actions = self.action_normalizer(actions - self._action_origin(batch))
        is_pad = None
        if config.do_mask_loss_for_padding:
            is_pad = self._tensor(batch, ACTION_IS_PAD, (count, config.horizon)).bool()

        draws = config.objective.noise_draws
        if draws > 1:
            conditioning, actions = (x.repeat_interleave(draws, dim=0) for x in (conditioning, actions))
            is_pad = None if is_pad is None else is_pad.repeat_interleave(draws, dim=0)
        timestep = self.objective.draw_timesteps(len(actions), actions.device)
        noisy, target = self.objective.corrupt(actions, torch.randn_like(actions), timestep)
        return masked_mse(self.noise_predictor(noisy, timestep, conditioning), target, is_pad)

    def encode(self, batch: Mapping[str, Any]) -> Tensor:
        """The conditioning (B, conditioning_dim) of a batch's observations and instructions."""
        state = self.state_normalizer(self._state(batch))
        if self.training and self.config.state_noise > 0:
            state = state + self.config.state_noise * torch.randn_like(state)
        images = {key: self._images(batch, key, len(state)) for key in self.observation_encoder.cameras}
        return self.observation_encoder(state, images, self._tasks(batch, len(state)))

    def sample(
        self,
        conditioning: Tensor,
        denoising_steps: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised actions (B, horizon, A) for a conditioning (B, conditioning_dim).

        noise (B, horizon, A) is the start of the loop, drawn from the generator if not given. Raises
        ValueError for steps outside 1 to objective.max_denoising_steps.
        """
        objective = self.config.objective
        steps = objective.denoising_steps if denoising_steps is None else denoising_steps
        if not 1 <= steps <= objective.max_denoising_steps:
            raise ValueError(f"denoising_steps must be 1 to {objective.max_denoising_steps}, got {steps}")
        shape = (len(conditioning), self.config.horizon, self.config.action_dim)
        if noise is None:
            noise = draw_noise(shape, conditioning, generator)
        elif noise.shape != shape:
            raise ValueError(f"noise must have the shape {shape} (batch, horizon, actions), got {tuple(noise.shape)}")
        return sample(
            lambda x, timestep: self.noise_predictor(x, timestep, conditioning),
            noise.to(conditioning),
            self.objective,
            steps,
            generator,
        )

    @torch.inference_mode()
    def predict_chunk(
        self,
        batch: Mapping[str, Any],
        denoising_steps: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Actions from now on, (B, horizon - n_obs_steps + 1, A) float32, absolute, in units.

        Row 0 belongs to the newest observation. Arguments as for `sample`.
        """
        with _evaluating(self):
            actions = self.sample(self.encode(batch), denoising_steps, noise, generator)
        actions = self.action_normalizer.undo(actions[:, self.config.n_obs_steps - 1 :])
        return actions + self._action_origin(batch)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: the vision encoders at lr times their multiplier, all else at lr, frozen none."""
        vision = [p for p in self.observation_encoder.vision_encoders.parameters() if p.requires_grad]
        of_vision = {id(p) for p in vision}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in of_vision]
        groups = [{"name": "policy", "params": rest, "lr": lr}]
        if vision:
            multiplier = self.config.observation_encoder.vision.lr_multiplier
            groups.append({"name": "vision", "params": vision, "lr": lr * multiplier})
        return groups

    def _action_origin(self, batch: Mapping[str, Any]) -> Tensor | float:
        """What actions are relative to: the newest state's joints, (B, 1, A), or nothing."""
        if self.config.action_mode == "absolute":
            return 0.0
        return self._state(batch)[:, -1:, self.config.action_state_indices]

    def _state(self, batch: Mapping[str, Any]) -> Tensor:
        return self._tensor(batch, STATE, (None, self.config.n_obs_steps, self.config.state_dim)).float()

    def _images(self, batch: Mapping[str, Any], key: str, count: int) -> Tensor:
        height, width = self.config.cameras[key]
        resized = self.observation_encoder.resized_shapes[key]
        if key in batch and tuple(batch[key].shape[-2:]) == resized:
            height, width = resized
        images = self._tensor(batch, key, (count, self.config.n_obs_steps, 3, height, width))
        if images.is_floating_point() and not 0 <= images.amin() <= images.amax() <= 1:
            raise ValueError(
                f"{key}: float pictures must lie in [0, 1], got {images.amin():.3g} to {images.amax():.3g}"
            )
        return images

    def _tasks(self, batch: Mapping[str, Any], count: int) -> list[str]:
        tasks = batch.get(TASK)
        if tasks is None or isinstance(tasks, str) or len(tasks) != count:
            raise ValueError(f"batch[{TASK!r}] must be a list of {count} instructions, one a sample; got {tasks!r}")
        return list(tasks)

    def _tensor(self, batch: Mapping[str, Any], key: str, shape: tuple[int | None, ...]) -> Tensor:
        """A batch's entry on the policy's device; its shape must be as given, None fitting any length."""
        if key not in batch:
            raise ValueError(f"the batch lacks {key}; it has {sorted(batch)}")
        value = torch.as_tensor(batch[key], device=self.device)
        if len(value.shape) != len(shape) or any(w not in (None, n) for n, w in zip(value.shape, shape, strict=True)):
            wanted = tuple("batch" if length is None else length for length in shape)
            raise ValueError(f"{key} has shape {tuple(value.shape)}, the policy takes {wanted}")
        return value


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode it had afterwards."""
    training = module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
