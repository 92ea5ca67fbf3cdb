"""Packages of the extra `safety`, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from secateur.errors import LoadFailure


def need(module: str) -> Any:
    """A module of scipy, statsmodels ...

    Raises:
        LoadFailure: it is not installed.

    >>> need("statmodels.stats")
    Traceback (most recent call last):
    secateur.errors.LoadFailure: This needs the package 'statmodels': pip install 'secateur[safety]'.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LoadFailure(
            f"This needs the package '{module.partition('.')[0]}': pip install 'secateur[safety]'."
        ) from error
