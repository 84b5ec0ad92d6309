"""Benchmarks: how long an optimizer step takes, against torch and other packages (`python -m bench`)."""
