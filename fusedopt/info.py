"""What this installation can do on this machine; see `fusedopt.backends.info`."""

from .backends.info import info, render

__all__ = ["info", "render"]
