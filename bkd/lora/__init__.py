"""Low-rank adapters: trained over shared weights, merged, and carried from a teacher to its students."""
