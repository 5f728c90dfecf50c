"""The section of a page that shows how the model fuses images."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ...results.figures import stages as page
from ...results.store.stage_records import StageRecord
from .inline import inline


def stages_section(record: StageRecord) -> dict[str, Any]:
    """What the template shows of an analysis."""
    tops = {
        (top.kind, top.layer): ", ".join(f"{token} ×{count}" for token, count in top.tokens)
        for top in record.top_tokens
    }
    return {
        "model": record.model,
        "said": [f"{found.task}, by the {found.by}: {found.said(record.depth)}" for found in record.stages],
        "svg": Markup(inline(page.draw(record), "stages-", "Stages by decoder layer")),
        "rule": record.rule,
        "tops": [
            (layer, *(tops.get((kind, layer), "–") for kind in ("hidden", "visual")))
            for layer in sorted({layer for _, layer in tops})
        ],
    }
