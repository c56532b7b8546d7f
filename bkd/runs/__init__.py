"""A run: its folder and its lock, its stages planned and set up, and the whole of it from recipe to student."""
