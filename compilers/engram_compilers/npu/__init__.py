"""Code for accelerators: weights as they read them and command streams."""
