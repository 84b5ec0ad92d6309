"""The rules in Triton: for AMD and Intel devices, and for NVIDIA ones where there was no nvcc.

One short file for each optimizer's equation, `rules.py` the list of them; `formats.py` and `codes.py` how numbers are
stored, `step.py` THE kernel, `prepare.py` what a step derives before it begins, `reduce.py` the gradient norm,
`launch.py` what the host does. Installed as fusedopt.triton_kernels; importing it imports triton.
"""
