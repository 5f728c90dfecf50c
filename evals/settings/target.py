"""What a prefill may cost: the targets of budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import OptionError, suggest

Kind = Literal["tokens", "tflops", "ms"]
_SPELLED = {"tokens": "T={:.4g}", "tflops": "{:.4g} TFLOPs", "ms": "{:.4g} ms"}


@dataclass(frozen=True)
class Target:
    """What a prefill may cost: ``tokens``, T; ``tflops``, executed multiply-adds times 10⁻¹²; or ``ms``, measured."""

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise OptionError(f"unknown target {self.kind!r}; {suggest(self.kind, get_args(Kind))}")
        if not (math.isfinite(self.value) and self.value >= 0):
            raise OptionError(f"target {self.kind} must be a number >= 0, not {self.value}")

    @classmethod
    def parse(cls, text: str) -> Target:
        """From ``tokens=48``, ``tflops=0.5`` or ``ms=30``."""
        kind, _, value = (part.strip() for part in text.partition("="))
        try:
            number = float(value)
        except ValueError:
            raise OptionError(f"target {text!r}: expected tokens=NUMBER, tflops=NUMBER or ms=NUMBER") from None
        return cls(kind, number)  # type: ignore[arg-type]  # checked there

    def spell(self, value: float) -> str:
        """A cost of this kind with its unit."""
        return _SPELLED[self.kind].format(value)

    def __str__(self) -> str:
        return self.spell(self.value)
