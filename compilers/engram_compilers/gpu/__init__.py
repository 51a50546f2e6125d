"""Libraries for GPUs: kernel sources and the plan of their launches."""
