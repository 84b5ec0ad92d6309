"""State dicts of other packages: decoded for torch.optim, and the 8-bit ones of bitsandbytes and torchao, both ways."""

from .bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .torch import to_torch_state_dict
from .torchao import from_torchao, to_torchao

__all__ = ["from_bitsandbytes", "from_torchao", "to_bitsandbytes", "to_torch_state_dict", "to_torchao"]
