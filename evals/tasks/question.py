"""A question as lmms-eval asks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """One of lmms-eval's requests to generate an answer, its arguments by name.

    ``prompt``: before the model's chat template. ``options``: how the task wants its answers generated, with the texts
    that end one under ``until``. ``visual``: gives the images of a document. ``doc_id``: its number in the task's
    ``split``.
    """

    prompt: str
    options: dict[str, Any]
    visual: Callable[[Any], list[Any]]
    doc_id: int
    task: str
    split: str

    @classmethod
    def of(cls, request: Any) -> Question:
        """What an lmms-eval ``Instance`` of kind ``generate_until`` asks."""
        return cls(*request.args)

    def ended(self, output: str) -> str:
        """``output`` up to the task's stop strings."""
        stops = self.options.get("until")
        for stop in [stops] if isinstance(stops, str) else stops or []:
            output = output.split(stop, 1)[0] if stop else output
        return output
