"""Benchmarks: the same workload on stock vLLM and on FastServe, in virtual and in wall time."""
