"""Which methods run on which family: asked of the code that refuses, on models without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from ...engine import prune
from ...errors import VisibenchError
from ...methods.registry import list_methods
from ...models.adapters import FAMILIES
from ...models.geometry import build
from ..settings.method_spec import parse, spell

DEPTH = 32
"""Decoder layers, so that layers that methods name by default exist."""


def families() -> list[str]:
    """Families of models that see, by ``model_type``."""
    return [kind for kind, family in FAMILIES.items() if family.projector is not None]


def example(kind: str) -> Any:
    """A model of a family without weights: transformers' default sizes, and what the family says besides."""
    given = FAMILIES[kind].example
    sizes: Any = type(AutoConfig.for_model(kind, **given).get_text_config())
    text = sizes(**given.get("text_config", {}), num_hidden_layers=DEPTH)
    config = AutoConfig.for_model(kind, **{**given, "text_config": text})
    return build(config, "meta", None, torch.device("cpu"), "auto", "sdpa")


def reasons(kind: str) -> dict[str, str]:
    """For each method, why it does not run on a family: empty if it does."""
    model, found = example(kind), {}
    for name, cls in list_methods().items():
        try:
            prune(model, parse(spell(cls, cls.examples[0])))
            found[name] = ""
        except VisibenchError as error:
            found[name] = str(error).removeprefix(name).lstrip(": ")
    return found
