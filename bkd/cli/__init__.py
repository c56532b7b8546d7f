"""The command line: the only place that prints. Nothing here imports torch before a command runs."""
