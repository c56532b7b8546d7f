"""Ways to train: each is an object whose `loss` the training loop calls and knows nothing else of."""
