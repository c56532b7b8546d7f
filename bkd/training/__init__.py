"""The training loop and its neighbours: processes, optimiser, averaged weights, checkpoints, logs, estimates."""
