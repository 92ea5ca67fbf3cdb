"""Models: loading, layers, saving."""
