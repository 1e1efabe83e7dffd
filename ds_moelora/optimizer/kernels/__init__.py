"""Compiled kernels for the optimizer step; optional."""
