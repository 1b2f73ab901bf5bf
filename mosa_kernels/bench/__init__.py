"""Measuring: how fast, against what, how far from the limit, at what memory, and whether it is still right.

`run.measure` makes a report; `mosa-kernels bench` and the scripts in benchmarks/ call it.
"""
