"""What a trained policy does, measured on recorded episodes and in the simulator.

opening.py       a checkpoint and the dataset it is held against, checked to be of one robot
held_out.py      which episodes its run never trained on
predictions.py   chunks predicted at recorded moments, beside the recorded actions
evaluation.py    their errors by step, action, task and episode, with baselines and the samples' spread
pages.py         the HTML reports of an evaluation and of a comparison
drawing.py       their charts, as SVG
comparison.py    several checkpoints at the same moments from the same noise
rollouts.py      closed loop in the simulator, in processes of their own
tuning.py        which n_action_steps, sampler and denoising steps are best
node_file.py     the policy node's parameter file, lines of it changed
colours.py       text on coloured cells that can be read
diagnosis.py     all that is measured to find out why a policy does not do what it should:
listening.py       what it attends to: asked again with other words, without a camera, without the state
idling.py          where it stands still
instructions.py    examples and error of each task, how alike the instructions are
findings.py      what that means in words, and which options change it
some_frames.py   the pictures of some moments, decoded once
"""
