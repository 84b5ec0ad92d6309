"""fusedopt: compiled-kernel optimizers for PyTorch.

import fusedopt
optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4, state_dtype="bfloat16", max_grad_norm=1.0)
"""

from .adamw import Adam, AdamW
from .optimizer import FusedOptimizer

__version__ = "0.1.0"
__all__ = ["Adam", "AdamW", "FusedOptimizer", "__version__"]
