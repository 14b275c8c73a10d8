"""A language-conditioned Multitask Diffusion-Transformer policy between a robot's topics and its controllers."""
