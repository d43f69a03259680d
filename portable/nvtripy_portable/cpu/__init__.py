"""The native executor: graphs of fused operations, run by the C++ kernels in one call."""
