"""A simulated manipulator (MuJoCo), its trajectory controller, a scripted expert and its recorder."""

from dit_policy_ros.sim.offscreen import choose_backend

choose_backend()  # here, because mujoco reads the choice once, when any module first imports it
