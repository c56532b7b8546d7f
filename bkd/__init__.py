"""bkd: take a Stable Diffusion model you trust, and make a smaller, faster one that is yours."""

__version__ = "0.1.0"
