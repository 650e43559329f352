"""What a run needs around the training loop: flags, set-up, run folder, saved models, log."""
