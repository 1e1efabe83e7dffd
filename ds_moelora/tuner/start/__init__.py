"""Experts that start from the singular values of the weight that they adapt."""
