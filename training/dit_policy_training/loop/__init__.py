"""A training run.

options.py       everything that can be chosen
trainer.py       the loop
optimization.py  optimizer, schedule, average of the weights, clipping
state.py         what continues a run exactly: written with each checkpoint, read again
checkpoints.py   which checkpoints are kept: the last, the best, some older ones
validation.py    loss and action error on episodes that are not trained on
tracking.py      where figures and pictures go: progress bar, metrics.jsonl, TensorBoard, Weights & Biases
pictures.py      curves, sample frames, predicted over recorded actions
"""
