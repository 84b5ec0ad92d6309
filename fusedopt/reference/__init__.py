"""Every optimizer once more in plain torch, as its paper writes it.

These functions are the oracle of the tests and the path for tensors that no compiled backend serves.
Each takes and returns tensors in the precision it computes in and changes nothing in place; formats,
rounding and devices are the business of the eager backend.
"""
