"""The scheduling policy: pure, deterministic, standard library only; time is an argument."""
