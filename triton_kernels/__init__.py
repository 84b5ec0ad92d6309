"""The rules in Triton: for AMD and Intel devices, and for NVIDIA ones where there was no nvcc.

There is one short file for each optimizer's equation, and `rules.py` lists them; `formats.py` and `codes.py` are how
numbers are stored, `step.py` is THE kernel, `prepare.py` what a step derives before it begins, `reduce.py` the gradient
norm, `launch.py` what the host does. Installed as fusedopt.triton_kernels; importing it imports triton.
"""
