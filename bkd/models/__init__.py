"""A model: found, checked, loaded, written as a folder or taken from a single file, and proved to load elsewhere."""
