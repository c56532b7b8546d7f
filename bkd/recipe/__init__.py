"""Recipes: their vocabulary, and the one place where text becomes settings."""
