"""One process or several: Hugging Face Accelerate, as `accelerate launch` and `torchrun` start it."""

from datetime import timedelta
from typing import Any

import torch

from dit_policy_ros.policy.checkpoint import usable_device
from dit_policy_training.loop.options import TrainConfig

PATIENCE = timedelta(hours=2)
"""How long processes wait for one that downloads the data, decodes, measures or saves; torch gives it minutes."""


def make_accelerator(config: TrainConfig) -> Any:
    """The Accelerator of a run. Raises ValueError for a device that is not there and for what Accelerate's
    configuration asks beyond several processes with the whole model each.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

    device = usable_device(config.device)
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        # Products of ten bits' mantissa, some times faster and fine for training; the fastest of the convolutions.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    precision = {"bfloat16": "bf16", "float16": "fp16"}[config.amp_dtype] if config.use_amp else "no"
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        # The trainer counts; what a file of `accelerate config` says would divide the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    known = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in known:
        raise ValueError(
            f"Accelerate is configured for {accelerator.distributed_type.value}; this trainer keeps the whole policy "
            "in each process: run `accelerate config` again, or launch with --multi_gpu"
        )
    return accelerator
