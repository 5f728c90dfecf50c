"""What ``visibench calibrate`` measured: settings of methods, their compute, and answers that are the dense model's."""

from __future__ import annotations

from typing import Any, Literal

from .records import Environment, Record

CALIBRATION = "calibration.json"


class Agreement(Record):
    """Share of answers that are the dense model's, with its 95 % interval, clustered by image."""

    share: float
    low: float
    high: float
    questions: int
    images: int


class CalibratedPoint(Record):
    """A setting as measured. ``macs``: executed multiply-adds of a prefill, vision included, mean over questions.

    ``tokens``: visual tokens, mean over decoder layers. ``agreement`` by task. ``complete``: where one task misses the
    target the others are not asked. ``confirmed``: measured on the second share of questions.
    """

    method: str
    spec: str
    macs: float
    tokens: float
    agreement: dict[str, Agreement]
    complete: bool
    confirmed: bool = False

    @property
    def least(self) -> Agreement:
        """That of the task where it is lowest."""
        return min(self.agreement.values(), key=lambda one: one.share)

    def reaches(self, target: float) -> bool:
        """Whether every task was asked and agrees at least so often."""
        return self.complete and self.least.share >= target


class ChosenSetting(Record):
    """The cheapest setting of a method that reaches the target on both shares of questions; None where there is none.

    ``by``: the criterion, in words. ``point``: on the second share. ``nearest``: where none reaches it, the one that
    agrees most.
    """

    method: str
    options: dict[str, Any]
    by: str
    point: CalibratedPoint | None
    nearest: CalibratedPoint | None


class CalibrationRecord(Record):
    """The outcome. ``searched`` and ``confirmed``: questions of each task in the two shares."""

    schema_version: Literal[1] = 1
    model: str
    checkpoint: str
    target: float
    tasks: dict[str, str]
    evaluation: dict[str, str]
    searched: int
    confirmed: int
    seed: int
    dense_macs: float
    dense_tokens: float
    points: list[CalibratedPoint]
    chosen: list[ChosenSetting]
    environment: Environment
