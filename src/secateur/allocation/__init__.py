"""How one target sparsity becomes one per layer, with an exact budget.

The budget is counted in weights: sum of sparsity * size over the layers equals target * total size. An allocation
is one file in this folder: a frozen dataclass whose fields are its options.
"""

from secateur.allocation.alpha import Alpha
from secateur.allocation.atp import Atp
from secateur.allocation.contract import HIGHEST, Allocation, Evidence, meet_budget
from secateur.allocation.descent import Descent
from secateur.allocation.owl import Owl
from secateur.allocation.table import Table
from secateur.allocation.uniform import Uniform

ALLOCATIONS: dict[str, type[Allocation]] = {kind.name(): kind for kind in (Uniform, Atp, Alpha, Owl, Descent, Table)}

__all__ = [
    "ALLOCATIONS",
    "HIGHEST",
    "Allocation",
    "Alpha",
    "Atp",
    "Descent",
    "Evidence",
    "Owl",
    "Table",
    "Uniform",
    "meet_budget",
]
