"""Kernels for the optimizer's step, optional: C++ for CPUs (`cpp`), and AdamW's step in the same pass (`adamw`)."""
