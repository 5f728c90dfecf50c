"""Compute of single prefills: traced on real or random prompts, or planned where there are no weights to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch

from ...engine import prune
from ...engine.trace import Trace
from ...methods import Method
from ...models import LoadedModel
from ...models.adapters import Geometry
from ..tasks.tasks import Task
from .flops import decode, executed
from .paper_flops import by_formula
from .prefill_plan import planned_prefill


def prompts(loaded: LoadedModel, task: Task, size: int, batch_size: int = 8) -> Iterator[Mapping[str, Any]]:
    """Model inputs for the first ``size`` questions of a task. Raises VisibenchError for images that cannot be read."""
    for first in range(0, size, batch_size):
        questions = [task.question(i) for i in range(first, min(first + batch_size, size))]
        texts, images = map(list, zip(*questions, strict=True))
        yield loaded.inputs(texts, images)


def prefills(loaded: LoadedModel, method: Method, batches: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One traced prefill of each row of the ``batches``, in MACs: one line a row.

    Columns: the components of :class:`~visibench.evals.compute.flops.Flops`; ``executed``, their sum; ``paper``, visual
    tokens alone; ``decode``, the first decoding step; ``visual_tokens`` and ``kv_lengths``, lists with one entry a
    decoder layer. Raises :class:`~visibench.errors.VisibenchError` for unusable options.
    """
    frames = []
    with torch.inference_mode(), prune(loaded.model, method) as session:
        for inputs in batches:
            loaded.model(**inputs, use_cache=False, logits_to_keep=1)
            frames.append(_columns(session.trace, loaded.geometry))
    return pd.concat(frames, ignore_index=True)


def planned(loaded: LoadedModel, method: Method, text: int, visual_tokens: int) -> pd.DataFrame:
    """The columns of :func:`prefills` for one prompt, as :func:`planned_prefill` has it."""
    return _columns(planned_prefill(loaded, method, text, visual_tokens), loaded.geometry)


def _columns(trace: Trace, geometry: Geometry) -> pd.DataFrame:
    flops = executed(trace, geometry)
    columns = flops.components() | {
        "executed": flops.total(),
        "paper": by_formula(trace, geometry).tolist(),
        "decode": decode(trace, geometry).total(),
        "visual_tokens": trace.visual_counts().tolist(),
        "kv_lengths": trace.kv_lengths().tolist(),
    }
    return pd.DataFrame(columns)
