"""The safety study: a dense model and its pruned copies on the same prompts, and what may be concluded."""
