"""The paper's evaluation figures, one command for each: `python -m benchmarks.figures 11`."""
