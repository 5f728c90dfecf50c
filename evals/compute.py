"""Compute of single prefills: traced on real or random prompts, or planned where there are no weights to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch

from ..engine import prune
from ..engine.trace import Trace
from ..errors import OptionError
from ..methods import Method
from ..models import LoadedModel
from ..models.adapters import Geometry
from .flops import decode, executed
from .paper_flops import Work, by_formula, planned
from .tasks import Task

_BEFORE_THE_PROJECTOR = {"image", "tower"}


def prompts(loaded: LoadedModel, task: Task, size: int, batch_size: int = 8) -> Iterator[Mapping[str, Any]]:
    """Model inputs for the first ``size`` questions of a task. Raises VisibenchError for images that cannot be read."""
    for first in range(0, size, batch_size):
        questions = [task.question(i) for i in range(first, min(first + batch_size, size))]
        texts, images = map(list, zip(*questions, strict=True))
        yield loaded.inputs(texts, images)


def prefills(loaded: LoadedModel, method: Method, batches: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One traced prefill of each row of the ``batches``, in MACs: one line a row.

    Columns: the components of :class:`~visibench.evals.flops.Flops`; ``executed``, their sum; ``paper``, visual tokens
    alone; ``decode``, the first decoding step; ``visual_tokens`` and ``kv_lengths``, lists with one entry a decoder
    layer. Raises :class:`~visibench.errors.VisibenchError` for unusable options.
    """
    found = []
    with torch.inference_mode(), prune(loaded.model, method) as session:
        for inputs in batches:
            loaded.model(**inputs, use_cache=False, logits_to_keep=1)
            found.append(_columns(session.trace, loaded.geometry))
    return pd.concat(found, ignore_index=True)


def plan(geometry: Geometry, method: Method, text: int, visual_tokens: int) -> pd.DataFrame:
    """The columns of :func:`prefills` for one prompt, as :func:`planned_prefill` has it."""
    return _columns(planned_prefill(geometry, method, text, visual_tokens), geometry)


def planned_prefill(geometry: Geometry, method: Method, text: int, visual_tokens: int) -> Trace:
    """The trace of one prompt's prefill, from sizes and options alone; nothing runs.

    ``text``: text tokens, half of them in front of the ``visual_tokens``. What the method itself computes is not
    known and left out. Raises :class:`OptionError` where the inputs decide how many tokens are left.
    """
    method.check(geometry)
    patches = geometry.vision.tokens if geometry.vision else 0
    if not patches:
        raise OptionError("images of this model take tokens by their size: give --weights random")
    if visual_tokens % patches:
        raise OptionError(f"visual tokens come in images of {patches}, not {visual_tokens}: give a multiple of that")
    prefix = text // 2
    whole = torch.full((1, geometry.layers), visual_tokens)
    start = planned(whole, visual_tokens, Work(), geometry, prefix=prefix, text=text - prefix)
    counts = method.visual_counts(start.prompt, geometry)
    if counts is None or _BEFORE_THE_PROJECTOR & set(method.stage):
        raise OptionError(f"{method}: what it saves shows only when it runs: give --weights random")
    trace = planned(counts, visual_tokens, Work(), geometry, prefix=prefix, text=text - prefix)
    if "vision" in method.stage:
        trace.projected = counts[:, 0]
    return trace


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
