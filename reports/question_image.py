"""Images of questions as reports show them, and what gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..results.store.records import CellConfig


@dataclass(frozen=True)
class QuestionImage:
    """An image to show. ``uri``: a data URI. ``grid``: patches a side, 0 where they are no square.

    ``whole``: whether it shows what the model saw, all of it and nothing else.
    """

    uri: str
    width: int
    height: int
    grid: int
    about: str
    whole: bool = True


ImageSource = Callable[[CellConfig, Mapping[int, str]], Mapping[int, Sequence[QuestionImage] | str]]
"""The images of some questions (prompt by doc_id) that a cell asked, or for each the reason why there is none."""


def no_images(config: CellConfig, prompts: Mapping[int, str]) -> dict[int, Sequence[QuestionImage] | str]:
    """For reports without any."""
    return dict.fromkeys(prompts, "left out")


def numbered(name: str, place: int) -> str:
    """What something is called that is the first, second … of its kind: with its number from the second on."""
    return f"{name}_{place}" if place > 1 else name
