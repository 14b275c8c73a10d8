"""The random numbers of a call of the loss: for a part of a batch, exactly those that the whole would have got.

Several processes that each take some rows of one batch draw for all of its rows and keep their own, so that a training
run is the same on one process or on several.
"""

import torch
from torch import Tensor


class Draws:
    """Draws for `rows` of a batch of `total` rows, from one generator; make one for each call of the loss.

    Every method is given its shape (n, ...), n being the rows of this part; the same sequence of calls with the
    generator in the same state gives each part its rows of what the whole batch would get.
    """

    def __init__(
        self, generator: torch.Generator | None = None, rows: slice | None = None, total: int | None = None
    ) -> None:
        """Default: torch's own generator of the device, and all rows.

        A generator of another device than the numbers are for draws on its own, and they are moved: the same numbers
        on any device. Raises ValueError for rows without total, and for rows that are not a part of total.
        """
        if (rows is None) != (total is None):
            raise ValueError(f"rows and total go together, got rows {rows} and total {total}")
        if rows is not None and total is not None:
            first, end = rows.start or 0, total if rows.stop is None else rows.stop
            if rows.step not in (None, 1) or not 0 <= first <= end <= total:
                raise ValueError(f"rows must be consecutive ones below total {total}, got {rows}")
            rows = slice(first, end)
        self._generator, self._rows, self._total = generator, rows, total

    def repeated(self, times: int) -> "Draws":
        """The same draws for a batch in which each row stands `times` times, one after the other."""
        if self._rows is None or self._total is None:
            return self
        rows = slice(self._rows.start * times, self._rows.stop * times)
        return Draws(self._generator, rows, self._total * times)

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal, float32."""
        return self._mine(torch.randn(self._whole(shape), generator=self._generator, device=self._on(device)), device)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform in [0, 1), float32."""
        return self._mine(torch.rand(self._whole(shape), generator=self._generator, device=self._on(device)), device)

    def integers(self, low: int, end: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform in low to end - 1, int64."""
        whole = self._whole(shape)
        return self._mine(torch.randint(low, end, whole, generator=self._generator, device=self._on(device)), device)

    def beta(self, alpha: float, beta: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Of Beta(alpha, beta), in [0, 1], float32."""
        # torch.distributions takes no generator; this is what its Beta calls.
        whole, on = self._whole(shape), self._on(device)
        concentration = torch.stack([torch.full(whole, value, device=on) for value in (alpha, beta)], dim=-1)
        return self._mine(torch._sample_dirichlet(concentration, self._generator)[..., 0], device)

    def _on(self, device: torch.device) -> torch.device:
        return device if self._generator is None else self._generator.device

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self._rows is None or self._total is None:
            return shape
        count = self._rows.stop - self._rows.start
        if shape[0] != count:
            raise ValueError(f"draws are for {count} rows of {self._total}, the batch has {shape[0]}")
        return (self._total, *shape[1:])

    def _mine(self, whole: Tensor, device: torch.device) -> Tensor:
        mine = whole if self._rows is None else whole[self._rows]
        return mine.to(device, non_blocking=device.type == "cuda")
