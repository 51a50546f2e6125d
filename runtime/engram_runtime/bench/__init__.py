"""Measure a bundle, and a peer on the same weights, each in a process of its own, in turn."""
