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

    ``tokens``: visual tokens, mean over decoder layers. ``agreement`` by task. ``confirmed``: measured on the second
    share.
    """

    method: str
    spec: str
    macs: float
    tokens: float
    agreement: dict[str, Agreement]
    confirmed: bool = False

    @property
    def least(self) -> Agreement:
        """That of the task where it is lowest."""
        return min(self.agreement.values(), key=lambda one: one.share)


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
    """The outcome. ``searched`` and ``confirmed``: questions of each task in the two shares.

    ``points``: settings that were asked all questions of a share. ``grids``: how many settings of each method there
    were to ask; ``given_up``: how many of them were asked until they could not reach the target any more.
    """

    schema_version: Literal[2] = 2
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
    grids: dict[str, int]
    given_up: dict[str, int]
    chosen: list[ChosenSetting]
    environment: Environment

    def searched_of(self, method: str) -> list[CalibratedPoint]:
        """What was measured of a method in the search."""
        return [point for point in self.points if point.method == method and not point.confirmed]

    def frontier(self, method: str) -> list[CalibratedPoint]:
        """Those of these that no other beats in multiply-adds and least agreement, by multiply-adds."""
        best: list[CalibratedPoint] = []
        for point in sorted(self.searched_of(method), key=lambda point: (point.macs, -point.least.share)):
            if not best or point.least.share > best[-1].least.share:
                best.append(point)
        return best
