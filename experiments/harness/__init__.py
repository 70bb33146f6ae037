"""What every experiment needs around its question: run folders, a training loop, checkpoints, and several devices."""
