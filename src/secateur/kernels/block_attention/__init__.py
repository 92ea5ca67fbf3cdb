"""Attention in which only chosen blocks of the matrix are computed."""

from secateur.kernels.block_attention.layout import BlockLayout

__all__ = ["BlockLayout"]
