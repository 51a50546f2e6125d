"""Bundles as C sources: kernels, forward passes, and what reads tables and takes tokens."""
