"""The model: configuration, encoders, transformer, objectives and checkpoints. No ROS, no OpenCV."""
