"""Every optimizer once more in plain torch, as its paper writes it.

These functions are the oracle of the tests, and the path for tensors that no compiled backend takes.
Each takes and returns tensors in the precision it computes in, and changes nothing in place. Formats,
rounding and devices are left to the eager backend.
"""
