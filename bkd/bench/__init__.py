"""What a recipe costs on this device: a few training steps timed, and what they hold in memory."""
