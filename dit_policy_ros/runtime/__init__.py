"""From topic data to safe motion: decoding, observation windows, chunks, the gate and trajectories. No ROS."""
