"""Secateur prunes language models and says honestly what the cut did."""

__version__ = "0.1.0"
