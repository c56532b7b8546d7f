"""Students in other forms, each read back without bkd, and which other tools load them."""
