"""A training run.

options.py       everything that can be chosen
trainer.py       the loop
optimization.py  optimizer, schedule, average of the weights, clipping
state.py         what continues a run exactly: written with each checkpoint, read again
checkpoints.py   which checkpoints are kept: the last, the best, some older ones
validation.py    loss and action error on episodes that are not trained on
progress.py      how far it is: a bar, or lines where there is no terminal
tracking.py      where figures and pictures go: metrics.jsonl, TensorBoard
wandb_run.py     and Weights & Biases
pictures.py      curves, sample frames, predicted over recorded actions
model_card.py    what a checkpoint says of itself
"""
