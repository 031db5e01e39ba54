"""Judging images: what the benchmarks draw and say, distances between sets of images, the patch grid.

Lies between sampling, through which it draws, and training, whose gate uses it.
"""
