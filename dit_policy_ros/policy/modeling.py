"""The Multitask DiT policy: observations and an instruction in, a chunk of actions out.

After "A Careful Examination of Large Behavior Models" (arXiv 2507.05331) and LeRobot's `multi_task_dit`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .batch import BatchReader
from .candidates import choose_candidate
from .configuration import ACTION, ACTION_IS_PAD, ENVIRONMENT_STATE, STATE, PolicyConfig
from .draws import Draws
from .encoders import ObservationEncoder
from .evaluation import EvaluationMode
from .normalization import Normalizer, Stats, stats_to_lists
from .objectives import LossTerms, make_objective, squared_error
from .realtime import ChunkInMotion, JoinTarget, differentiable, guided, join_target
from .sampling import (
    AS_CONFIGURED,
    Plan,
    Predict,
    Sampling,
    by_instruction,
    check_noise,
    draw_noise,
    draw_step_noise,
    make_plan,
    token_timesteps,
)
from .transformer import DiffusionTransformer


class MultitaskDiTPolicy(nn.Module):
    """A policy with everything it needs to act: encoders, transformer, objective, and its data's statistics.

    A batch maps feature keys to tensors or arrays: `observation.images.<camera>` (B, n_obs, 3, H, W) uint8
    (or float in [0, 1]), `observation.state` and `observation.environment_state` (B, n_obs, S), all earliest
    first, as far as the policy has them; `task`: B instructions, if it reads any. Training adds `action`
    (B, horizon, A), absolute, in units, and `action_is_pad` (B, horizon) bool. No batch is ever changed.
    """

    def __init__(self, config: PolicyConfig, stats: Stats, tokenizer: Any | None = None):
        """`stats` are the dataset's; with relative actions stats["action"] are those of the differences.

        The tokenizer comes from text.model unless given. Raises ConfigurationError, StatsError.
        """
        super().__init__()
        config.validate()
        self.config = config
        self.stats = stats_to_lists(stats)
        modes, constant = config.normalization_mapping, config.normalized_constant
        self.state_normalizer = self.environment_state_normalizer = None
        if config.state_dim:
            self.state_normalizer = Normalizer(STATE, modes["STATE"], config.state_dim, stats, constant)
        if config.environment_state_dim:
            mode = config.environment_state_mode
            dim = config.environment_state_dim
            self.environment_state_normalizer = Normalizer(ENVIRONMENT_STATE, mode, dim, stats, constant)
        self.action_normalizer = Normalizer(ACTION, modes["ACTION"], config.action_dim, stats, constant)
        self.observation_encoder = ObservationEncoder(config, tokenizer)
        self.noise_predictor = DiffusionTransformer(
            config.transformer, config.action_dim, config.horizon, self.observation_encoder.conditioning_dim
        )
        self.objective = make_objective(config.objective)
        self._reader = BatchReader(config, self.observation_encoder.resized_shapes)
        self._evaluation = EvaluationMode()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.noise_predictor.output_proj.weight.device

    @property
    def text_modulates_vision(self) -> bool:
        """Whether a picture's feature depends on the instruction, so that it holds for that instruction only."""
        return bool(self.config.cameras) and self.config.observation_encoder.vision.is_modulated_by_text

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes every table that is not in the state_dict anew, on a device.

        For a policy built on the meta device, once its weights are assigned: all else comes from the weights.
        """
        for module in self.modules():
            reset = getattr(module, "reset_buffers", None)
            if module is not self and reset is not None:
                reset(device)

    def loss(self, batch: Mapping[str, Any], draws: Draws | None = None) -> Tensor:
        """The objective's loss, a scalar, on fresh noise and timesteps: the mean of `loss_terms`."""
        return self.loss_terms(batch, draws).mean

    def forward(self, batch: Mapping[str, Any], draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """`loss_terms`, total and count: what a wrapper for several processes calls."""
        terms = self.loss_terms(batch, draws)
        return terms.total, terms.count

    def loss_terms(self, batch: Mapping[str, Any], draws: Draws | None = None) -> LossTerms:
        """The objective's squared error and how many elements it is of; everything random of it comes from `draws`.

        In training mode pictures are cut at random and their colours jittered, `state_noise` is added and a share
        `instruction_dropout` of the samples gets no instruction; in evaluation mode nothing of that. With `max_delay`
        a sample's first steps are given clean in both modes and the loss is that of the others. Raises ValueError for
        a batch that does not fit.
        """
        config, read, draws = self.config, self._reader, draws or Draws()
        conditioning = self.encode(batch, self._without_instruction(batch, draws), draws)
        count = len(conditioning)
        actions = read.in_units(ACTION, read.entry(batch, ACTION), (count, config.horizon, config.action_dim))
        actions = self.action_normalizer(self._here(actions, torch.float32) - self.action_origin(batch))
        ignored = None
        if config.do_mask_loss_for_padding:
            padded = read.shaped(ACTION_IS_PAD, read.entry(batch, ACTION_IS_PAD), (count, config.horizon))
            ignored = self._here(padded, torch.bool)

        repeats = config.objective.noise_draws
        if repeats > 1:
            draws = draws.repeated(repeats)
            actions = actions.repeat_interleave(repeats, dim=0)
            ignored = None if ignored is None else ignored.repeat_interleave(repeats, dim=0)
        drawn = self.objective.draw_timesteps(len(actions), actions.device, draws)
        noisy, target = self.objective.corrupt(actions, draws.normal(tuple(actions.shape), actions.device), drawn)
        timestep = self.objective.embedding_timestep(drawn)
        if config.max_delay > 0:
            committed = self._draw_committed(len(actions), draws)
            noisy = torch.where(committed.unsqueeze(-1), actions, noisy)
            timestep = torch.where(committed, self.objective.clean_timestep, timestep.unsqueeze(1))
            ignored = committed if ignored is None else ignored | committed
        return squared_error(self.noise_predictor(noisy, timestep, conditioning), target, ignored)

    def _here(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A batch's value on the policy's device; a copy to a GPU does not wait for what the GPU is doing."""
        return value.to(self.device, dtype, non_blocking=self.device.type == "cuda")

    def _without_instruction(self, batch: Mapping[str, Any], draws: Draws) -> bool | Tensor:
        """Which samples train without their instruction, (B,) bool, or False for none."""
        share = self.config.instruction_dropout
        if share == 0 or not self.training:
            return False
        return draws.uniform((self._count(batch),), self.device) < share

    def _draw_committed(self, count: int, draws: Draws) -> Tensor:
        """Which steps are given clean, (count, horizon) bool: those of a delay uniform in 0 to max_delay.

        The delay counts from the newest observation. The steps before it are past and known whenever a step is
        committed: they too come from the chunk in motion (the chunks of arXiv 2512.05964 begin at the observation).
        """
        config = self.config
        delay = draws.integers(0, config.max_delay + 1, (count, 1), self.device)
        known = torch.where(delay > 0, delay + config.n_obs_steps - 1, 0)
        return torch.arange(config.horizon, device=self.device) < known

    def encode(
        self, batch: Mapping[str, Any], without_instruction: bool | Tensor = False, draws: Draws | None = None
    ) -> Tensor:
        """The conditioning (B, conditioning_dim) of a batch's observations and instructions.

        without_instruction: True, or (B,) bool for some samples, puts a learned vector in the place of the words,
        also where they modulate vision. In training mode what is random comes from `draws`. Raises ValueError for a
        batch that does not fit, or if the policy has not learned that vector (instruction_dropout 0).
        """
        count, read = self._count(batch), self._reader
        text = self.text_features(read.tasks(batch, count), without_instruction)
        pictures = {
            key: self._here(read.images(key, read.entry(batch, key), (count, self.config.n_obs_steps)))
            for key in self.observation_encoder.cameras
        }
        frames = self.observation_encoder.frame_features(pictures, text, draws)
        state, environment_state = (
            read.entry(batch, key) if key in self.config.input_features else None for key in (STATE, ENVIRONMENT_STATE)
        )
        return self.assemble(state, frames, text, environment_state, draws)

    def text_features(self, tasks: Sequence[str] | None, without_instruction: bool | Tensor = False) -> Tensor | None:
        """The instructions' part of the conditioning, (B, text_dim); None if the policy reads none.

        A policy that reads none takes the instructions it was trained on (config.tasks, if it names any) or no
        tasks at all: anything else it cannot do, and it would do what it knows instead. Raises ValueError for
        that, and as `encode` does.
        """
        known = self.config.tasks if self.observation_encoder.text_encoder is None else []
        unknown = [task for task in tasks or () if task not in known]
        if known and unknown:
            raise ValueError(f"this policy reads no instructions and knows only {known}; it cannot do {unknown[0]!r}")
        return self.observation_encoder.text_features(tasks, without_instruction)

    def encode_frame(self, camera_key: str, images: Any, text: Tensor | None) -> Tensor:
        """One frame's feature (B, image_dim), as `encode` computes it among others.

        images (B, 3, H, W) uint8 or float in [0, 1]; text as `text_features` gives it, of which only a policy whose
        `text_modulates_vision` takes notice. Raises ValueError for a camera the policy has not, and for images
        that do not fit.
        """
        if camera_key not in self.config.cameras:
            raise ValueError(f"the policy has no camera {camera_key}; it has {list(self.config.cameras)}")
        if text is None and self.text_modulates_vision:
            raise ValueError(f"the words modulate what this policy sees: encode_frame({camera_key!r}) needs `text`")
        images = self._reader.images(camera_key, images, (None,)).to(self.device)
        if text is not None:
            self._reader.shaped(f"the words for {camera_key}", text, (len(images), self.config.transformer.hidden_dim))
        return self.observation_encoder.image_features(camera_key, images.unsqueeze(1), text)[:, 0]

    def assemble(
        self,
        state: Any | None,
        frames: Mapping[str, Tensor],
        text: Tensor | None,
        environment_state: Any | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """The conditioning (B, conditioning_dim) from its parts, None for what the policy does not take.

        state and environment_state (B, n_obs, S) in units; frames {camera key: (B, n_obs, image_dim)}; text
        (B, text_dim). In training mode `state_noise` is added, from `draws`. Raises ValueError for a part that is
        missing, not taken, or of another shape, and for a state that is not finite.
        """
        encoder, config = self.observation_encoder, self.config
        taken = {STATE: state, ENVIRONMENT_STATE: environment_state, **frames, "text": text}
        given = {key for key, value in taken.items() if value is not None}
        needed = set(config.input_features) | ({"text"} if encoder.text_encoder is not None else set())
        if given != needed:
            raise ValueError(f"the conditioning is made of {sorted(needed)}, got {sorted(given)}")
        states = []
        if self.state_normalizer is not None:
            states.append(self.state_normalizer(self._state(STATE, state)))
            if self.training and config.state_noise > 0:
                noise = (draws or Draws()).normal(tuple(states[0].shape), self.device)
                states[0] = states[0] + config.state_noise * noise
        if self.environment_state_normalizer is not None:
            states.append(self.environment_state_normalizer(self._state(ENVIRONMENT_STATE, environment_state)))
        named = {
            **dict(zip((key for key in (STATE, ENVIRONMENT_STATE) if key in given), states, strict=True)),
            **frames,
        }
        counts = {key: len(part) for key, part in named.items()}
        count = next(iter(counts.values()))
        if any(each != count for each in counts.values()):
            raise ValueError(f"the parts of the conditioning are of batches of different sizes: {counts}")
        for key, part in frames.items():
            self._reader.shaped(f"the feature of {key}", part, (count, config.n_obs_steps, encoder.image_dim))
        if text is not None:
            self._reader.shaped("the feature of the instruction", text, (count, config.transformer.hidden_dim))
        return encoder.assemble(states, frames, text)

    def sample(
        self,
        conditioning: Tensor,
        sampling: Sampling = AS_CONFIGURED,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        unconditional: Tensor | None = None,
        join: JoinTarget | None = None,
    ) -> Tensor:
        """Normalised actions (B * candidates, horizon, A) for a conditioning (B, C); an observation's stand together.

        noise (B * candidates, horizon, A) is the start of the loop, drawn from the generator if not given.
        unconditional (B, C) is `encode(batch, without_instruction=True)`, needed for a guidance_scale other than 1.
        join (realtime.join_target) makes the chunk agree with the one in motion, by `join.joining`. Raises
        ValueError for choices the policy cannot follow and noise that does not fit.
        """
        chosen = sampling.resolve(self.config)
        if chosen.guidance_scale == 1:
            unconditional = None
        elif unconditional is None:
            raise ValueError(
                f"guidance_scale {chosen.guidance_scale} needs `unconditional`, the conditioning without the "
                "instruction: policy.encode(batch, without_instruction=True)"
            )
        shape = (len(conditioning) * chosen.candidates, self.config.horizon, self.config.action_dim)
        noise = draw_noise(shape, conditioning, generator) if noise is None else check_noise(noise, shape)
        noise = noise.to(conditioning)
        plan = make_plan(self.objective, chosen.sampler, chosen.denoising_steps, conditioning.device)
        step_noise = draw_step_noise(plan, noise, generator)
        if join is not None:
            join = join.repeat(chosen.candidates)
        if join is not None and join.joining in ("guided", "guided_cheap"):
            cheap = join.joining == "guided_cheap"
            if not cheap and self.noise_predictor.output_proj.weight.is_inference():
                raise ValueError(
                    "joining 'guided' differentiates the network, which was built in torch.inference_mode() and cannot "
                    "be; build or load the policy outside, or join by 'guided_cheap'"
                )
            with nullcontext() if cheap else differentiable():
                network = self.network(plan, conditioning, unconditional, chosen.guidance_scale, chosen.candidates)
                network = guided(network, plan, join, chosen.max_joining_weight, cheap)
                # A tensor made in inference mode cannot be differentiated, its copy made outside can.
                return plan.run(network, noise.clone(), step_noise)
        prefix = join.prefix if join is not None and join.joining == "prefix" else None
        return self.denoise(plan, noise, step_noise, prefix, conditioning, unconditional, chosen.guidance_scale)

    def denoise(
        self,
        plan: Plan,
        x: Tensor,
        step_noise: Tensor | None,
        prefix: Tensor | None,
        conditioning: Tensor,
        unconditional: Tensor | None,
        guidance_scale: float,
    ) -> Tensor:
        """The denoising loop, from noise x (B * candidates, T, A) to normalised actions; the engine has a faster one.

        conditioning and unconditional (None: no guidance by the instruction) have B rows; the others are as `Plan.run`
        takes them.
        """
        candidates = len(x) // len(conditioning)
        prefix_steps = 0 if prefix is None else prefix.shape[1]
        network = self.network(plan, conditioning, unconditional, guidance_scale, candidates, prefix_steps)
        return plan.run(network, x, step_noise, prefix)

    def network(
        self,
        plan: Plan,
        conditioning: Tensor,
        unconditional: Tensor | None,
        guidance_scale: float,
        candidates: int = 1,
        prefix_steps: int = 0,
    ) -> Predict:
        """The transformer as a plan calls it, its conditioning (B, C) the same for so many candidates.

        Both halves of classifier-free guidance go through it as one batch. The first prefix_steps steps are given the
        timestep of clean actions.
        """
        rows = conditioning if unconditional is None else torch.cat([conditioning, unconditional])
        rows = rows.repeat_interleave(candidates, dim=0)

        def predict(x: Tensor, call: int) -> Tensor:
            timestep = plan.timesteps[call].expand(len(x))
            if prefix_steps:
                timestep = token_timesteps(plan, call, len(x), x.shape[1], prefix_steps)
            return self.noise_predictor(x, timestep, rows)

        return predict if unconditional is None else by_instruction(predict, guidance_scale)

    def predict_chunk(
        self,
        batch: Mapping[str, Any],
        sampling: Sampling = AS_CONFIGURED,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        motion: ChunkInMotion | None = None,
        weaker: "MultitaskDiTPolicy | None" = None,
    ) -> Tensor:
        """Actions from now on, (B, horizon - n_obs_steps + 1, A) float32, absolute, in units.

        Row 0 belongs to the newest observation. sampling, noise and generator as for `sample`. motion is the chunk
        being executed, with which the new one is to agree (realtime.py); weaker, such as an earlier checkpoint,
        proposes as many candidates, and the one kept is unlike them (candidates.py). Raises ValueError for arguments
        that do not fit, or that would have no effect.
        """
        if sampling.candidates == 1 and weaker is not None:
            raise ValueError("`weaker` helps to choose among candidates: Sampling(candidates=...) must be at least 2")
        candidates = self.predict_candidates(batch, sampling, noise, generator, motion)
        if weaker is None:
            return self.best_candidate(candidates, sampling, motion)
        proposed = weaker.predict_candidates(batch, Sampling(candidates=sampling.candidates), generator=generator)
        return self.best_candidate(candidates, sampling, motion, proposed)

    @torch.inference_mode()
    def predict_candidates(
        self,
        batch: Mapping[str, Any],
        sampling: Sampling = AS_CONFIGURED,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        motion: ChunkInMotion | None = None,
    ) -> Tensor:
        """All candidates, (B, candidates, horizon - n_obs_steps + 1, A); arguments as for `predict_chunk`.

        The observation is encoded once for all of them.
        """
        with self.evaluating():
            conditioning = self.encode(batch)
            unconditional = None
            if sampling.resolve(self.config).guidance_scale != 1:
                unconditional = self._unconditional(batch, conditioning)
            origin = self.action_origin(batch)
            return self.candidates_from(conditioning, origin, sampling, noise, generator, unconditional, motion)

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode inside, for as long as any thread needs it."""
        return self._evaluation(self.modules())

    def _unconditional(self, batch: Mapping[str, Any], conditioning: Tensor) -> Tensor:
        """`encode(batch, without_instruction=True)`; pictures that no words modulate are not encoded again."""
        if self.text_modulates_vision:
            return self.encode(batch, without_instruction=True)
        tasks = self._reader.tasks(batch, len(conditioning))
        null = self.text_features(tasks, without_instruction=True)
        assert null is not None  # a policy that is guided by words reads them
        return self.observation_encoder.replace_text(conditioning, null)

    def candidates_from(
        self,
        conditioning: Tensor,
        origin: Tensor,
        sampling: Sampling = AS_CONFIGURED,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        unconditional: Tensor | None = None,
        motion: ChunkInMotion | None = None,
    ) -> Tensor:
        """`predict_candidates` from what is encoded already; origin (B, 1, A) as `action_origin` gives it."""
        chosen = sampling.resolve(self.config)
        if motion is not None and chosen.joining is None and chosen.candidates == 1:
            raise ValueError("`motion` has no effect with joining None and one candidate; leave it out")
        join = None
        if motion is not None:
            join = join_target(
                motion,
                self.config,
                len(conditioning),
                lambda actions: self.action_normalizer(actions.to(origin) - origin),
                chosen.joining,
            )
        actions = self.sample(conditioning, sampling, noise, generator, unconditional, join)
        actions = actions[:, self.config.n_obs_steps - 1 :].unflatten(0, (-1, chosen.candidates))
        return self.action_normalizer.undo(actions) + origin.unsqueeze(1)

    @torch.inference_mode()
    def best_candidate(
        self,
        candidates: Tensor,
        sampling: Sampling = AS_CONFIGURED,
        motion: ChunkInMotion | None = None,
        weaker: Tensor | None = None,
    ) -> Tensor:
        """The chunk (B, T, A) that candidates.py chooses of (B, N, T, A); weaker (B, K, T, A), all in units."""
        if candidates.shape[1] == 1:
            return candidates[:, 0]

        def comparable(actions: Tensor) -> Tensor:
            """Actions, of which only differences matter, such that each dimension counts by its range."""
            return actions.to(candidates) * self.action_normalizer.inverse_scale

        best = choose_candidate(
            comparable(candidates),
            None if motion is None else comparable(motion.actions),
            sampling.coherence_decay,
            None if weaker is None else comparable(weaker),
        )
        return candidates[torch.arange(len(candidates), device=best.device), best]

    def action_origin(self, batch: Mapping[str, Any]) -> Tensor:
        """What actions are relative to, in units: the newest state's joints (B, 1, A), or 0 (1, 1, A)."""
        if self.config.action_mode == "absolute":
            return self.action_normalizer.centre.new_zeros(1, 1, self.config.action_dim)
        # Chosen where the state is: choosing on a GPU would wait for it.
        state = self._reader.state(STATE, self._reader.entry(batch, STATE))
        return self._here(state[:, -1:, self.config.action_state_indices], torch.float32)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: the vision encoders at lr times their multiplier, all else at lr, frozen none.

        The multiplier is for what was trained before, so a ViT's pooling by the words, which was not, is with the
        rest.
        """
        encoders = self.observation_encoder.vision_encoders
        named = [(name, p) for name, p in encoders.named_parameters() if p.requires_grad]
        vision = [p for name, p in named if ".text_pooling." not in name]
        of_vision = {id(p) for p in vision}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in of_vision]
        groups = [{"name": "policy", "params": rest, "lr": lr}]
        if vision:
            multiplier = self.config.observation_encoder.vision.lr_multiplier
            groups.append({"name": "vision", "params": vision, "lr": lr * multiplier})
        return groups

    def _count(self, batch: Mapping[str, Any]) -> int:
        count = self._reader.count(batch)
        if count == 0:
            raise ValueError("the batch is empty: its inputs have no sample")
        return count

    def _state(self, key: str, value: Any) -> Tensor:
        """A state (B, n_obs, S) on the policy's device."""
        return self._here(self._reader.state(key, value), torch.float32)
