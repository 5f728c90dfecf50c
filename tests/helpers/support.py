"""Small models with random weights and batches for them; where the recorded vectors lie."""

from pathlib import Path

from visibench.evals.invariants.miniature import IMAGE, collate, make_batch, make_llava, state

__all__ = ["GOLDEN", "IMAGE", "collate", "make_batch", "make_llava", "state"]

GOLDEN = Path(__file__).parents[1] / "golden"
