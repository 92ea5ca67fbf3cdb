"""The page that shows what pruning runs did."""

from secateur.report.page import page

__all__ = ["page"]
