"""CUDA graphs: a function's kernels recorded once, then started by one call from the host.

At batch 1 a denoising loop is a few thousand small kernels, and starting them one by one takes longer than running
them. A graph (CUDA C++ Programming Guide, "CUDA Graphs") replays them with the same addresses: inputs are copied into
tensors of its own, and the result out of them.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .recent import Recent

Function = Callable[..., Tensor]

WARM_UP_CALLS = 3
"""Before the capture, so that libraries have chosen their kernels and allocated their workspaces."""


class GraphedFunction:
    """function(*inputs) as one graph replay, for tensors of the shapes and dtypes it was captured with.

    An input may be None. The function must draw no random numbers and must not wait for the device. The result is a
    copy: the next call does not change it.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor | None, ...]):
        self._function = function  # what it holds (tables, weights) has addresses that the graph reads
        self._inputs = tuple(None if each is None else each.clone() for each in inputs)
        device = next(each.device for each in self._inputs if each is not None)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Another thread may go on using the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The function's result for other values of the same shapes."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._graph.replay()
        return self._output.clone()


class GraphCache:
    """The graphs used last, at most `size` of them: each holds memory of its own on the device."""

    def __init__(self, size: int = 8):
        self._graphs: Recent[GraphedFunction] = Recent(size)

    def call(self, key: Hashable, function: Function, *inputs: Tensor | None) -> Tensor:
        """function(*inputs), captured if no graph of that key, shapes and dtypes is there."""
        full = (key, *(None if each is None else (tuple(each.shape), each.dtype) for each in inputs))
        return self._graphs.get(full, lambda: GraphedFunction(function, inputs))(*inputs)

    def clear(self) -> None:
        """Forgets all graphs and frees their memory."""
        self._graphs.clear()
