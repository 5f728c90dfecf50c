"""Compute of real prompts: one traced prefill of each of a task's first questions."""

from __future__ import annotations

import pandas as pd
import torch

from ..engine import prune
from ..methods import Method
from ..models import LoadedModel
from .flops import decode, executed
from .paper_flops import by_formula
from .tasks import Task


def prefills(loaded: LoadedModel, method: Method, task: Task, size: int, batch_size: int = 8) -> pd.DataFrame:
    """One row for each of the first ``size`` questions, in MACs.

    Columns: the components of :class:`~visibench.evals.flops.Flops`; ``executed``, their sum; ``paper``, visual tokens
    alone; ``decode``, the first decoding step; ``visual_tokens`` and ``kv_lengths``, lists with one entry a decoder
    layer. Raises :class:`~visibench.errors.VisibenchError` for images that cannot be read and unusable options.
    """
    batches = []
    with torch.inference_mode(), prune(loaded.model, method) as session:
        for first in range(0, size, batch_size):
            questions = [task.question(i) for i in range(first, min(first + batch_size, size))]
            prompts, images = map(list, zip(*questions, strict=True))
            loaded.model(**loaded.inputs(prompts, images), use_cache=False, logits_to_keep=1)
            trace, geometry = session.trace, loaded.geometry
            flops = executed(trace, geometry)
            columns = flops.components() | {
                "executed": flops.total(),
                "paper": by_formula(trace, geometry).tolist(),
                "decode": decode(trace, geometry).total(),
                "visual_tokens": trace.visual_counts().tolist(),
                "kv_lengths": trace.kv_lengths().tolist(),
            }
            batches.append(pd.DataFrame(columns))
    return pd.concat(batches, ignore_index=True)
