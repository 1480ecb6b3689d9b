"""Simulates the live scheduler: the same policy and planner on a discrete-event engine.

Pure: imports neither vLLM nor torch. Same seed, same bytes (I7).
"""
