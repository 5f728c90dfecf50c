"""A W&B report of a run folder: words, plots of the runs in its group, tables, and where each method comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...errors import DataError
from ...methods import list_methods
from ...results.store.records import CONTROL
from ...results.tables.render import render
from ...results.tables.summary import by_group, lead
from ...results.tables.tables import ResultTable
from ..question_image import numbered
from .sink import Destination, reason


def document(tables: Sequence[ResultTable], destination: Destination) -> Any:
    """The report, a ``wandb_workspaces.reports.v2.Report``. Its runs are the destination's."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents(), wr.H1("Summary")]
    for table in tables:
        blocks += [wr.P(line) for line in lead(table)]
        blocks += [wr.MarkdownBlock(f"**{title}.** {text}") for title, text in by_group(table)]
    blocks += [wr.H1("Plots"), wr.PanelGrid(runsets=[_runs(destination)], panels=_panels(tables))]
    means = _means(tables)
    blocks += [wr.PanelGrid(runsets=[_runs(destination, "sweep")], panels=means)] * bool(means)
    blocks += [wr.H1("Tables"), wr.MarkdownBlock(render(list(tables), "md"))]
    used = sorted({row.method for table in tables for row in table.rows})
    blocks += [wr.H1("Methods"), wr.UnorderedList([note(name) for name in used])]
    title = f"Visual-token pruning: {destination.group}"[:128]
    return wr.Report(
        project=destination.project, entity=destination.entity or "", title=title, blocks=blocks, width="fluid"
    )


def note(name: str) -> str:
    """A method's title, paper and authors' code."""
    if name == CONTROL:
        return f"{CONTROL}: random tokens at a method's own layers and counts"
    method = list_methods().get(name)
    if method is None:
        return f"{name}: a method that is not installed here"
    paper = f", arXiv {method.paper}" if method.paper else ""
    source = f", after {method.source}" if method.source else ""
    return f"{name}: {method.title}{paper}{source}"


def _runs(destination: Destination, kind: str = "cell") -> Any:
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    group = [expr.Metric("Group") == destination.group, expr.Metric("JobType") == kind]
    return wr.Runset(name=f"{'Cells' if kind == 'cell' else 'Tables'} of {destination.group}", filters=group)


def _panels(tables: Sequence[ResultTable]) -> list[Any]:
    """A task each: accuracy against executed compute, and bars by method."""
    import wandb_workspaces.reports.v2 as wr

    metrics = {task: scores[0] for table in tables for task, scores in table.metrics.items()}
    panels: list[Any] = []
    for place, (task, score) in enumerate(metrics.items()):
        name = wr.SummaryMetric(f"{task}/{score.key}")
        cost = wr.SummaryMetric("compute/tflops")
        panels += [
            wr.ScatterPlot(
                title=f"{task}: {score.title} against executed TFLOPs",
                x=cost,
                y=name,
                layout=wr.Layout(x=0, y=8 * place, w=12, h=8),
            ),
            wr.BarPlot(
                title=f"{task}: {score.title} by method",
                metrics=[name],
                groupby=wr.Config("label"),
                layout=wr.Layout(x=12, y=8 * place, w=12, h=8),
            ),
        ]
    return panels


def _means(tables: Sequence[ResultTable]) -> list[Any]:
    """Mean score retained over several tasks against executed compute, a point a row of the sweep's own table.

    No run of a cell knows other tasks, so the points come from the table; the picture beside them names the methods.
    """
    import wandb_workspaces.reports.v2 as wr

    panels: list[Any] = []
    for place, table in enumerate(tables, start=1):
        if len(table.metrics) < 2 or not any(row.retained for row in table.rows):
            continue
        place = 4 * len(panels)
        title = f"mean over {len(table.metrics)} tasks: score retained, % of dense, against executed TFLOPs"
        panels += [
            wr.CustomChart(
                query={"summaryTable": {"tableKey": numbered("table", place)}},
                chart_name="wandb/scatter/v0",
                chart_fields={"x": "executed_tmacs_question_alone", "y": "retained_percent"},
                chart_strings={"title": title},
                layout=wr.Layout(x=0, y=place, w=12, h=8),
            ),
            wr.MediaBrowser(
                title="Every task and their mean, with names",
                media_keys=[numbered("plots/pareto", place)],
                num_columns=1,
                layout=wr.Layout(x=12, y=place, w=12, h=8),
            ),
        ]
    return panels


def as_json(report: Any) -> dict[str, Any]:
    """What saving would send, as JSON values."""
    return report._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def save(tables: Sequence[ResultTable], destination: Destination) -> str:
    """Save the report and return its address. Raises :class:`DataError` where W&B does not take it."""
    import wandb

    try:
        entity = destination.entity or wandb.Api(timeout=20).default_entity
        return document(tables, replace(destination, entity=entity)).save().url
    except Exception as error:  # an outage, a refusal, or a fault of wandb itself
        raise DataError(f"W&B did not take the report: {reason(error)}") from error
