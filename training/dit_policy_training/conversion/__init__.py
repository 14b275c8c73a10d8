"""Recordings to LeRobot datasets: read, sampled, cut into episodes, written, checked, shown. No ROS needed."""
