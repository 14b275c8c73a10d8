"""A policy whose costly parts take their fast forms: the same weights, the same interface, the same sampling code.

Only three places differ from MultitaskDiTPolicy: how a picture becomes a feature, how the transformer is called in the
denoising loop, and that features computed earlier may stand in a batch for the pictures.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import ENVIRONMENT_STATE, STATE
from .cuda_graph import Function, GraphCache
from .draws import Draws
from .encoders import ObservationEncoder
from .fast_transformer import FastTransformer
from .fast_vision import FastViT, Unsupported
from .modeling import MultitaskDiTPolicy
from .recent import Recent
from .sampling import Plan, Predict, by_instruction
from .text import TEXT_CACHE_SIZE
from .vision import ClipVision, ViT

logger = logging.getLogger(__name__)

FRAMES = "frame_features"
"""In a batch, in place of the pictures: {camera key: (B, n_obs, image_dim)}, as `encode_frame` gives them."""
FRAMES_WITHOUT_INSTRUCTION = "frame_features_without_instruction"
"""The same for guidance by the instruction, needed where the words modulate vision."""

TABLES = 8
"""How many plans' timestep tables are kept, 7 MB for a plan of 100 calls at the default size, and how many graphs."""

VISION, TRANSFORMER, COMPILE, CUDA_GRAPH = "vision", "transformer", "compile", "cuda_graph"


class FastPaths:
    """The fast forms of one policy's parts, and which of them are in use.

    While `verifying`, a path that fails raises. `why_not` says of each path that could not be built what prevented it;
    `broken` are those for which that is a defect. `lost` says of each path that failed later, in use, how it did.
    """

    def __init__(self, policy: MultitaskDiTPolicy, dtype: torch.dtype, compile: bool, cuda_graphs: bool):
        self.vits: list[FastViT] = []
        self.transformer: FastTransformer | None = None
        self.compiled: Callable[[Tensor, Tensor], Tensor] | None = None
        self.graphs = GraphCache(size=TABLES)
        self.available: list[str] = []
        self.why_not: dict[str, str] = {}
        self.broken: set[str] = set()
        self.lost: dict[str, str] = {}
        self._tables: Recent[Tensor] = Recent(TABLES)
        self._build(VISION, lambda: self._make_vits(policy, dtype))
        self._build(TRANSFORMER, lambda: self._make_transformer(policy, dtype, packed=not compile))
        if compile:
            self._build(COMPILE, self._compile)
        if cuda_graphs and policy.device.type == "cuda":
            self.available.append(CUDA_GRAPH)
        self.in_use = set(self.available)
        self.verifying = False

    @property
    def bytes(self) -> int:
        """Memory of the copied weights, beside the policy's own."""
        return sum(vit.bytes for vit in self.vits) + (0 if self.transformer is None else self.transformer.bytes)

    def table(self, plan: Plan) -> Tensor:
        """The timesteps' part of adaLN for a plan, (layers, calls + 1, 6 * hidden), the clean timestep's last."""
        transformer = self.transformer
        assert transformer is not None

        def make() -> Tensor:
            clean = plan.timesteps.new_tensor([plan.clean_timestep])
            return transformer.table(torch.cat([plan.timesteps, clean]))

        return self._tables.get((plan.sampler, plan.steps), make)

    def graphed(self, key: Hashable, function: Function, *inputs: Tensor | None) -> Tensor:
        """function(*inputs) by one graph replay; where the capture fails, without graphs from then on."""
        try:
            return self.graphs.call(key, function, *inputs)
        except Exception as error:  # if it is the function's own, the function says so below
            if self.verifying:
                raise
            self.lost[CUDA_GRAPH] = f"{type(error).__name__}: {error}"
            logger.warning("fast path %s is not in use any more, a graph failed: %s", CUDA_GRAPH, error)
            self.in_use.discard(CUDA_GRAPH)
            self.graphs.clear()
            return function(*inputs)

    def _build(self, name: str, make: Callable[[], None]) -> None:
        try:
            make()
        except Unsupported as error:
            self.why_not[name] = str(error)
        except Exception as error:  # whatever it is, the plain path does the same work
            self.why_not[name] = f"it could not be built, {type(error).__name__}: {error}"
            self.broken.add(name)
        else:
            self.available.append(name)

    def _make_vits(self, policy: MultitaskDiTPolicy, dtype: torch.dtype) -> None:
        encoder = policy.observation_encoder
        if not len(encoder.vision_encoders):
            raise Unsupported("the policy has no camera")
        for vision in encoder.vision_encoders:
            if not isinstance(vision, ViT):
                raise Unsupported(f"there is no fast form of {type(vision).__name__}, only of CLIP and DINOv3 ViTs")
            is_clip = isinstance(vision, ClipVision)
            norm_cls = vision.use_post_layernorm if isinstance(vision, ClipVision) else True
            patches = vision.text_pooling is not None
            self.vits.append(FastViT(vision.model, dtype, norm_cls, norm_patches=not is_clip, patches=patches))

    def _make_transformer(self, policy: MultitaskDiTPolicy, dtype: torch.dtype, packed: bool) -> None:
        heads = policy.config.transformer.num_heads
        self.transformer = FastTransformer(policy.noise_predictor, heads, dtype, packed)

    def _compile(self) -> None:
        if self.transformer is None:
            raise Unsupported("the transformer has no fast form to compile")
        self.compiled = torch.compile(self.transformer.__call__, dynamic=False)


class FastPolicy(MultitaskDiTPolicy):
    """The given policy, sharing its modules, with the paths in `paths.in_use` instead of the plain ones.

    Not thread-safe, and made of the weights as they are, which must stay so. What it computes is that of evaluation
    mode, also if the policy, whose modules these are, has been put into training mode since.
    """

    def __init__(self, policy: MultitaskDiTPolicy, paths: FastPaths):
        nn.Module.__init__(self)
        self.__dict__.update(policy.__dict__)
        self._modules = dict(policy._modules)
        self._modules["observation_encoder"] = _FastEncoder(policy.observation_encoder, paths)
        self.paths = paths
        self._texts: Recent[Tensor] = Recent(TEXT_CACHE_SIZE)
        self.eval()
        self._every = list(self.modules())

    def _count(self, batch: Mapping[str, Any]) -> int:
        if FRAMES not in batch:
            return super()._count(batch)
        parts = [*batch[FRAMES].values(), *(batch[key] for key in (STATE, ENVIRONMENT_STATE) if key in batch)]
        if not parts:
            raise ValueError(
                f"an observation without frames and states; the policy takes {list(self.config.input_features)}"
            )
        if len(parts[0]) == 0:
            raise ValueError("the frames are an empty batch")
        return len(parts[0])

    def evaluating(self) -> AbstractContextManager[None]:
        """As the policy's, faster: finding all modules takes 0.3 ms, and every chunk and every frame needs it."""
        return self._evaluation(self._every)

    def encode(
        self, batch: Mapping[str, Any], without_instruction: bool | Tensor = False, draws: Draws | None = None
    ) -> Tensor:
        """As the policy's; a batch may hold FRAMES in place of the pictures."""
        if FRAMES not in batch:
            return super().encode(batch, without_instruction, draws)
        text = self.text_features(self._reader.tasks(batch, self._count(batch)), without_instruction)
        frames = batch[FRAMES]
        if without_instruction is not False and self.text_modulates_vision:
            if FRAMES_WITHOUT_INSTRUCTION not in batch:
                raise ValueError(
                    "the words modulate what this policy sees, so guidance needs each frame's feature without the "
                    "instruction as well: encode_frame(..., without_instruction=True)"
                )
            frames = batch[FRAMES_WITHOUT_INSTRUCTION]
        return self.assemble(batch.get(STATE), frames, text, batch.get(ENVIRONMENT_STATE))

    def text_features(self, tasks: Sequence[str] | None, without_instruction: bool | Tensor = False) -> Tensor | None:
        """As the policy's; the projected feature of an instruction is kept, since its weights stay as they are."""
        if tasks is None or self.observation_encoder.text_encoder is None or without_instruction is not False:
            return super().text_features(tasks, without_instruction)
        if not all(isinstance(task, str) and task.strip() for task in tasks):
            return super().text_features(tasks)  # which says what is wrong with which of them
        plain = super().text_features

        def encode(task: str) -> Tensor:
            feature = plain([task])
            assert feature is not None
            return feature[0]

        return torch.stack([self._texts.get(task, partial(encode, task)) for task in tasks])

    def network(
        self,
        plan: Plan,
        conditioning: Tensor,
        unconditional: Tensor | None,
        guidance_scale: float,
        candidates: int = 1,
        prefix_steps: int = 0,
    ) -> Predict:
        """As the policy's, by the fast transformer, but where the network is to be differentiated."""
        if TRANSFORMER not in self.paths.in_use or not torch.is_inference_mode_enabled():
            return super().network(plan, conditioning, unconditional, guidance_scale, candidates, prefix_steps)
        part = self._conditioning_part(conditioning, unconditional, candidates)
        return self._fast_network(plan, self.paths.table(plan), part, guidance_scale, prefix_steps)

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
        """As the policy's; on CUDA one graph replay."""
        in_use = self.paths.in_use
        if not {CUDA_GRAPH, TRANSFORMER} <= in_use or not torch.is_inference_mode_enabled():
            return super().denoise(plan, x, step_noise, prefix, conditioning, unconditional, guidance_scale)
        table = self.paths.table(plan)  # made outside the graph, which reads it: the loop keeps it alive

        def loop(
            x: Tensor, step_noise: Tensor | None, prefix: Tensor | None, with_it: Tensor, without: Tensor | None
        ) -> Tensor:
            part = self._conditioning_part(with_it, without, len(x) // len(with_it))
            prefix_steps = 0 if prefix is None else prefix.shape[1]
            network = self._fast_network(plan, table, part, guidance_scale, prefix_steps)
            return plan.run(network, x, step_noise, prefix)

        inputs = (x, step_noise, prefix, conditioning, unconditional)
        key = ("denoise", plan.sampler, plan.steps, guidance_scale, COMPILE in in_use)
        return self.paths.graphed(key, loop, *inputs)

    def _conditioning_part(self, conditioning: Tensor, unconditional: Tensor | None, candidates: int) -> Tensor:
        """The conditioning's part of adaLN, (layers, rows, 6 * hidden); a single row serves all candidates."""
        assert self.paths.transformer is not None
        rows = conditioning if unconditional is None else torch.cat([conditioning, unconditional])
        part = self.paths.transformer.conditioning_part(rows)
        return part if len(rows) == 1 else part.repeat_interleave(candidates, dim=1)

    def _fast_network(
        self, plan: Plan, table: Tensor, part: Tensor, guidance_scale: float, prefix_steps: int
    ) -> Predict:
        paths = self.paths
        assert paths.transformer is not None
        transformer: Callable[[Tensor, Tensor], Tensor] = paths.transformer
        if COMPILE in paths.in_use and paths.compiled is not None:
            transformer = paths.compiled
        rows, known = part[:, :, None], None
        if prefix_steps:
            known = (torch.arange(self.config.horizon, device=table.device) < prefix_steps)[:, None]

        def predict(x: Tensor, call: int) -> Tensor:
            of_time = table[:, call, None, None]
            if known is not None:
                of_time = torch.where(known, table[:, -1, None, None], of_time)
            return transformer(x, rows + of_time)

        return predict if guidance_scale == 1 else by_instruction(predict, guidance_scale)


class _FastEncoder(ObservationEncoder):
    """The given encoder, sharing its modules, with fast vision where it is in use."""

    def __init__(self, encoder: ObservationEncoder, paths: FastPaths):
        nn.Module.__init__(self)
        self.__dict__.update(encoder.__dict__)
        self._modules = dict(encoder._modules)
        self.paths = paths
        self.eval()

    def image_features(self, key: str, images: Tensor, text: Tensor | None) -> Tensor:
        paths = self.paths
        if VISION not in paths.in_use or not torch.is_inference_mode_enabled():
            return super().image_features(key, images, text)
        camera = self.cameras.index(key)
        index = camera if len(self.vision_encoders) > 1 else 0
        pixels = self.preprocessors[camera](images).flatten(0, 1)
        if CUDA_GRAPH in paths.in_use:
            tokens = paths.graphed((VISION, index), paths.vits[index], pixels)
        else:
            tokens = paths.vits[index](pixels)
        vision = self.vision_encoders[index]
        assert isinstance(vision, ViT)
        feature, pooling = tokens[:, 0], vision.text_pooling
        if pooling is not None:
            assert text is not None
            words = text.repeat_interleave(images.shape[1], dim=0)
            feature = torch.cat([feature, pooling(tokens[:, 1:], words)], dim=-1)
        return feature.view(*images.shape[:2], -1)
