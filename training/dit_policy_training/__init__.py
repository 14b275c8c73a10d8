"""Bags to LeRobot datasets, and datasets to checkpoints. No ROS."""
