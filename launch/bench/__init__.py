"""Timings: engines, collectives and kernels."""
