"""Shards, latents, captions: read safely, checked, filtered, encoded, and served in an order that is computed."""
