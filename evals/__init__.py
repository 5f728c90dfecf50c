"""Evaluation: tasks, the bridge to lmms-eval, compute, time, and sweeps over all of them."""
