"""The only package that imports rclpy: the policy node, the simulator's node and the demo."""
