"""The model card: what a student is, written from its run for those who find it on the Hub."""
