"""Linear layers for inference: frozen weights, laid out once for the processor's matrix kernels.

On a CPU, `F.linear` rearranges its weights on every call. oneDNN can do that once, and can apply an activation or add
a residual while the result is still in cache. PyTorch reaches it only through private operators, those that its
compiler emits for frozen graphs, so they are used here and nowhere else, and where they are missing `F.linear` does the
same.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["none", "gelu", "gelu_tanh", "swish", "relu"]

_FUSED: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "swish": ("swish", ""),
    "relu": ("relu", ""),
}


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and processor have packed kernels for the dtype."""
    operators = torch.ops.mkldnn
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype in supported:
        return hasattr(operators, supported[dtype]) and bool(getattr(operators, supported[dtype])())
    return dtype == torch.float32


class FrozenLinear:
    """activation(x weight^T + bias) with a copy of the weights, (outputs, inputs), in the dtype of the products.

    Inputs are cast to that dtype, results are in it. `packed` False keeps the plain layout, for compilers and devices
    that choose their own. The copy costs the weights' size again (half of it in bf16).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: Activation = "none",
        packed: bool = True,
    ):
        self.activation = activation
        self.dtype = dtype
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.packed = packed and can_pack(weight.device, dtype)
        self.bytes = weight.numel() * dtype.itemsize
        if self.packed:
            # Without a hint at the number of rows: the layout it then chooses was the fastest for 1 to 394 of them.
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        x = x.to(self.dtype)
        if self.packed:
            name, algorithm = _FUSED[self.activation]
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return _activate(F.linear(x, self.weight, self.bias), self.activation)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the layer without activation; the sum has the residual's dtype, (..., outputs)."""
        x = x.to(self.dtype)
        if not self.packed:
            return residual + F.linear(x, self.weight, self.bias)
        if residual.dtype == self.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return residual + torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "none":
        return x
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.silu(x) if activation == "swish" else F.relu(x)
