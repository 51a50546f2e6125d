"""Libraries for GPUs: the plan of their launches, devices, and the executor; tables stay with the host."""
