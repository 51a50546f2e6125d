"""Accelerators beside the host: what they are asked, the simulators that stand for them, and their command streams."""

from engram_runtime.npu.device import Cost, Device, Geometry, Product, Program
from engram_runtime.npu.devices import open_device, parse_geometry

__all__ = ["Cost", "Device", "Geometry", "Product", "Program", "open_device", "parse_geometry"]
