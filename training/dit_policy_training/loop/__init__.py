"""A training run.

options.py       everything that can be chosen
arguments.py     the settings of a run that starts from a checkpoint
trainer.py       the loop
policies.py      the policy that is trained: a new one, one from another's weights, the one of a run that goes on
optimization.py  optimizer, schedule, average of the weights, clipping
processes.py     one process or several
prefetch.py      the next batches, made ready while a step runs
interrupts.py    signals that end a run after its step
failures.py      no memory, no disk: what to change
state.py         what continues a run exactly: written with each checkpoint, read again
continuing.py    what may change when a run goes on, and what may not
checkpoints.py   which checkpoints are kept: the last, the best, some older ones
validation.py    loss and action error on episodes that are not trained on
progress.py      how far it is: a bar, or lines where there is no terminal
summary.py       what a run says at its start and its end
tracking.py      where figures and pictures go: metrics.jsonl, TensorBoard
wandb_run.py     and Weights & Biases
pictures.py      curves, sample frames, predicted over recorded actions
model_card.py    what a checkpoint says of itself
"""
