"""A simulated manipulator (MuJoCo): scene, task, trajectory controller, scripted expert and recorder. No ROS."""
