"""Other people's checkpoints: read LeRobot's and the original's, write LeRobot's.

    python -m dit_policy_ros.policy.interop SRC DST --to native|lerobot

Reads LeRobot's `multi_task_dit` (0.5 and 0.6) and brysonjones/multitask_dit_policy. SRC is a checkpoint's folder
or one above it, as training left it; averaged weights (`pretrained_model_ema`) are preferred. Only safetensors
are read, never a pickle.

A foreign checkpoint holds the weights of CLIP's towers but neither the tokenizer nor the towers' configuration:
these come from the folder or hub name it tells, or from `--clip=FOLDER`. If that has no configuration, it is
inferred from the tensors where that is exact.

What LeRobot's format has no place for (the embodiment, the tasks, the exact statistics) is written into a folder
`native/` beside it, which LeRobot does not read; converted back, it gives the same checkpoint.
"""
