"""The same burst of requests on stock vLLM and on FastServe: `python -m benchmarks.demo`."""
