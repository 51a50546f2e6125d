"""Block sizes of kernels, measured on the machine that runs them. No bit of a result depends on them."""
