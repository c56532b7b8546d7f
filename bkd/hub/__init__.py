"""A student on the Hugging Face Hub: what goes up, whether it is ready, how it gets there, and what can go wrong."""
