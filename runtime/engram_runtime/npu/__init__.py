"""Accelerators beside the host: what they are asked, the simulators that stand for them, and their command streams."""
