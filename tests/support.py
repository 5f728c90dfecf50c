"""Small models and batches for programs outside the suite: put ``tests`` on the path, at the root of a checkout."""

from visibench.evals.invariants.miniature import make_batch, make_llava

__all__ = ["make_batch", "make_llava"]
