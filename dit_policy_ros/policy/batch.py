"""What a policy is given, checked: each thing that does not fit is refused by name, with what was expected."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration import TASK, NoTextConfig, PolicyConfig

Shape = tuple[int | None, ...]
"""None fits any length."""


class BatchReader:
    """Reads a batch's entries for one policy. Every method raises ValueError for what does not fit.

    Values may be tensors or arrays. They stay where they are: what is checked of one on the host then waits for no
    device.
    """

    def __init__(self, config: PolicyConfig, resized_shapes: Mapping[str, tuple[int, int]]):
        """resized_shapes: (H, W) of each camera's pictures after scaling, as a training cache may hold them."""
        self._config = config
        self._resized_shapes = resized_shapes

    def entry(self, batch: Mapping[str, Any], key: str) -> Any:
        """What the batch holds for a key."""
        if key not in batch:
            raise ValueError(f"the batch lacks {key}; it has {sorted(batch)}")
        return batch[key]

    def count(self, batch: Mapping[str, Any]) -> int:
        """How many samples a batch has: as many as its first input says."""
        key = next(iter(self._config.input_features))
        shape = as_tensor(key, self.entry(batch, key)).shape
        if not shape:
            raise ValueError(f"{key} is a single number; its first dimension must be the batch")
        return shape[0]

    def tasks(self, batch: Mapping[str, Any], count: int) -> list[str] | None:
        """A batch's instructions; None only if the policy needs none."""
        tasks = batch.get(TASK)
        if tasks is None and isinstance(self._config.observation_encoder.text, NoTextConfig):
            return None
        if tasks is None or isinstance(tasks, str) or not isinstance(tasks, Iterable) or len(list(tasks)) != count:
            raise ValueError(f"batch[{TASK!r}] must be a list of {count} instructions, one a sample; got {tasks!r}")
        for sample, task in enumerate(tasks):
            if not isinstance(task, str):
                raise ValueError(f"batch[{TASK!r}][{sample}] must be an instruction in words, got {task!r}")
        return list(tasks)

    def state(self, key: str, value: Any) -> Tensor:
        """A state (B, n_obs, S), finite, in units."""
        return self.in_units(key, value, (None, self._config.n_obs_steps, self._config.input_features[key].shape[0]))

    def in_units(self, key: str, value: Any, shape: Shape) -> Tensor:
        """Finite floating-point numbers (B, steps, N)."""
        value = self.shaped(key, value, shape)
        if not value.is_floating_point():
            raise ValueError(f"{key} is {_name(value.dtype)}; the policy takes floating-point values in units")
        if not value.isfinite().all():
            sample, step, index = (~value.isfinite()).nonzero()[0].tolist()
            number = value[sample, step, index].item()
            raise ValueError(f"{key} is not finite: sample {sample}, step {step}, dimension {index} is {number}")
        return value

    def images(self, key: str, value: Any, lead: Shape) -> Tensor:
        """A camera's pictures (*lead, 3, H, W), as recorded or as a training cache holds them scaled."""
        height, width = self._config.cameras[key]
        resized = self._resized_shapes[key]
        if tuple(getattr(value, "shape", ()))[-2:] == resized:
            height, width = resized
        images = self.shaped(key, value, (*lead, 3, height, width))
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"{key}: pictures are uint8, or floating-point in [0, 1]; got {_name(images.dtype)}")
        if images.is_floating_point() and not 0 <= images.amin() <= images.amax() <= 1:
            raise ValueError(
                f"{key}: float pictures must lie in [0, 1], got {images.amin():.3g} to {images.amax():.3g}; "
                "give 0 to 255 as uint8"
            )
        return images

    def shaped(self, key: str, value: Any, shape: Shape) -> Tensor:
        """A value as a tensor of a shape."""
        value = as_tensor(key, value)
        fits = [wanted in (None, length) for length, wanted in zip(value.shape, shape, strict=False)]
        if len(value.shape) == len(shape) and all(fits):
            return value
        wanted = tuple("batch" if length is None else length for length in shape)
        message = f"{key} has shape {tuple(value.shape)}, the policy takes {wanted}"
        is_window = key in self._config.input_features and len(shape) in (3, 5)  # a single frame has 4
        if is_window and len(value.shape) == len(shape) and fits == [True, False, *fits[2:]]:
            message += (
                f": {self._config.n_obs_steps} observation steps, earliest first. Where an episode has only begun, "
                "repeat its first observation"
            )
        raise ValueError(message)


def as_tensor(key: str, value: Any) -> Tensor:
    """A tensor, or an array or list of numbers, as a tensor. Raises ValueError, calling it by `key`."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key} is no tensor or array of numbers but a {type(value).__name__}: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
