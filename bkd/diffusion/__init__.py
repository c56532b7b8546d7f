"""Noise: levels, predictions, samplers and grids of steps, and what a student knows of steps and guidance."""
