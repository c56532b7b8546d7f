"""The page of a run, or of several: self-contained, and escaped throughout."""
