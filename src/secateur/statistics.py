"""What is remembered of a layer's inputs: running sums that can be merged.

X: (tokens, in) inputs of a layer. Sums count tokens, never sequences, so the way the calibration set
is cut into batches changes nothing but rounding. Matrices are summed in fp32 (fp64 when X is fp64),
vectors in fp64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor

from secateur.factor import InverseFactor, Spectrum, spectrum

Norm = Literal["l1", "l2"]
S = TypeVar("S", bound="Statistic")
_BLOCK = 256  # inputs whose products with all later ones are taken at once


class Statistic(ABC):
    """A running sum over tokens. `tokens` counts what has been seen."""

    def __init__(self) -> None:
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add inputs x: (tokens, in), any float dtype."""
        if x.shape[0]:
            self.tokens += x.shape[0]
            self._add(x)

    @abstractmethod
    def _add(self, x: Tensor) -> None: ...

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add what `other` has seen, as if this one had seen it."""

    @staticmethod
    @abstractmethod
    def bytes_for(width: int) -> int:
        """Memory for a layer of `width` inputs, for estimates."""


class SecondMoment(Statistic):
    """Mean of the squares of every input, E[x_j^2].

    >>> moment = SecondMoment()
    >>> moment.update(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    >>> moment.mean.tolist(), moment.tokens
    ([12.5, 2.0], 2)
    """

    def __init__(self) -> None:
        super().__init__()
        self._sum: Tensor | None = None

    def _add(self, x: Tensor) -> None:
        square = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(0).double()
        self._sum = square if self._sum is None else self._sum.add_(square)

    def merge(self, other: Self) -> None:
        self.tokens += other.tokens
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum

    @property
    def mean(self) -> Tensor:
        """(in,) fp64. Needs at least one token."""
        if self._sum is None:
            raise ValueError("no token has been seen")
        return self._sum / self.tokens

    @property
    def rms(self) -> Tensor:
        """(in,) root mean square: the column norm of X divided by sqrt(tokens)."""
        return self.mean.sqrt()

    @staticmethod
    def bytes_for(width: int) -> int:
        return 8 * width


class Gram(Statistic):
    """The second-moment matrix E[x x^T], (in, in) symmetric.

    Only the blocks on and above the diagonal are summed, with torch's own products on every device: numpy's symmetric
    update is as fast by itself, but its threads and torch's get in each other's way (docs/LOG.md).

    >>> gram = Gram()
    >>> gram.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.mean.tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """

    def __init__(self) -> None:
        super().__init__()
        self._sum: Tensor | None = None  # right only on and above the diagonal
        self.factors: dict[float, InverseFactor] = {}  # by damping; shared by the layers that read one input
        self._spectrum: Spectrum | None = None

    def _add(self, x: Tensor) -> None:
        self.factors.clear()
        self._spectrum = None
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        width = x.shape[1]
        if self._sum is None:
            self._sum = x.new_zeros(width, width)
        for start in range(0, width, _BLOCK):
            rows = slice(start, start + _BLOCK)
            self._sum[rows, start:].addmm_(x[:, rows].t(), x[:, start:])

    def merge(self, other: Self) -> None:
        self.factors.clear()
        self._spectrum = None
        self.tokens += other.tokens
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum

    @property
    def mean(self) -> Tensor:
        """(in, in). Needs at least one token."""
        if self._sum is None:
            raise ValueError("no token has been seen")
        upper = self._sum.triu()
        return upper.add_(upper.triu(1).t()).div_(self.tokens)

    @property
    def spectrum(self) -> Spectrum:
        """Its eigenvectors, once inputs have power one; worked out once for all layers that read the input."""
        if self._spectrum is None:
            self._spectrum = spectrum(self.mean)
        return self._spectrum

    def output_power(self, weight: Tensor) -> float:
        """E[|W x|^2], the mean square of the outputs that W: (out, in) gives, summed over the outputs.

        >>> gram = Gram()
        >>> gram.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> gram.output_power(torch.tensor([[1.0, 1.0]]))
        9.0
        """
        return float(torch.linalg.vecdot(weight @ self.mean, weight).sum(dtype=torch.float64))

    @staticmethod
    def bytes_for(width: int) -> int:
        return 4 * width * width


class Bundle:
    """Several statistics of one input, fed together. `bundle[Gram]` gives one of them.

    >>> bundle = Bundle((SecondMoment, Gram))
    >>> bundle.update(torch.ones(3, 2))
    >>> bundle[Gram].tokens, bundle.tokens
    (3, 3)
    """

    def __init__(self, kinds: tuple[type[Statistic], ...] = ()) -> None:
        self._statistics: dict[type[Statistic], Statistic] = {kind: kind() for kind in kinds}
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add inputs x: (tokens, in)."""
        self.tokens += len(x)
        for statistic in self._statistics.values():
            statistic.update(x)

    def __getitem__(self, kind: type[S]) -> S:
        statistic = self._statistics[kind]
        assert isinstance(statistic, kind)
        return statistic


@dataclass
class Gradient:
    """The gradients of one layer over all sequences. `sum`: (out, in) fp32, of |g| (l1) or of g^2 (l2).

    >>> Gradient("l2", 2, torch.tensor([[8.0]])).mean
    tensor([[2.]])
    """

    norm: Norm
    samples: int
    sum: Tensor

    @property
    def mean(self) -> Tensor:
        """(out, in): mean of |g|, or the root mean square of g. Does not grow with the number of samples."""
        mean = self.sum / max(self.samples, 1)
        return mean if self.norm == "l1" else mean.sqrt()

    @property
    def total(self) -> Tensor:
        """(out, in): sum of |g|, or the root of the sum of g^2, as GBLM's released code has it."""
        return self.sum if self.norm == "l1" else self.sum.sqrt()

    @property
    def seen(self) -> bool:
        """Whether any sequence reached the layer."""
        return bool(self.sum.any())
