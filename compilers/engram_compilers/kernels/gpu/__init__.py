"""Kernels for GPUs: blocks of threads, in the TIR that TVM prints as CUDA C++, OpenCL C and Metal alike."""
