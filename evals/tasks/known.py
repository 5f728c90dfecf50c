"""What is known of the tasks with embedded data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskMetric:
    """One of lmms-eval's metrics, by its key there, as tables show it. ``maximum`` None: not known beforehand."""

    key: str
    title: str
    maximum: float | None = 1.0


@dataclass(frozen=True)
class TaskInfo:
    """Facts about a task. The first metric is its headline.

    ``cluster`` is the column that names the image, ``target`` the one with the reference answers where lmms-eval's own
    notion of a target is a placeholder.
    """

    name: str
    title: str
    about: str
    metrics: tuple[TaskMetric, ...]
    cluster: str | None = None
    target: str | None = None


TASKS = {
    info.name: info
    for info in (
        TaskInfo(
            "gqa",
            "GQA",
            "compositional questions about a scene",
            (TaskMetric("exact_match", "exact match"),),
            "imageId",
        ),
        TaskInfo(
            "mme",
            "MME",
            "two yes/no questions an image; the score counts single answers and whole pairs, 200 a category",
            (TaskMetric("mme_perception_score", "perception", None),),
            "question_id",
        ),
        TaskInfo(
            "textvqa_val",
            "TextVQA",
            "reading words in an image, ten reference answers a question",
            (TaskMetric("exact_match", "VQA accuracy"),),
            "image_id",
            "answers",
        ),
        TaskInfo(
            "pope",
            "POPE",
            "is an object there? absent ones are random, popular or adversarial",
            (TaskMetric("pope_f1_score", "F1"), TaskMetric("pope_accuracy", "accuracy")),
            "image_source",
        ),
    )
}
