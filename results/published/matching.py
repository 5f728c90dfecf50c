"""Own results beside published figures, where the two can be compared.

They can if the checkpoint is the same, all questions of the benchmark were asked, the metric is the same, and the
method ran with the options that the source gives or with a budget close to the nominal one, and with its defaults in
all that the source does not name. All else is left out, with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...methods.registry import list_methods
from ..store.records import VisualTokens
from ..store.store import Cell
from . import Figure, Row, figures, in_order, vocabulary
from .show import COUNTED, Grid, formatted, origin, record

TOLERANCE = 0.05
"""Largest distance between own and nominal budget, as a share of the nominal one."""

RULE = (
    "Gap: ours - published, in the unit given. Compared are the same checkpoint, all questions, the same metric, and "
    f"the options that the source gives or a budget within {100 * TOLERANCE:g} % of the nominal one, all other options "
    "at their defaults; differences in prompts, precision or software remain."
)


@dataclass(frozen=True)
class Ours:
    """One method on one task, mean over ``seeds``; ``questions`` asked of ``total``.

    ``metrics``: lmms-eval's, by its keys and in its units.
    """

    label: str
    model: str
    method: str
    options: dict[str, Any]
    task: str
    origin: str
    questions: int
    total: int
    seeds: int
    metrics: dict[str, float]
    tokens: VisualTokens


@dataclass(frozen=True)
class Match:
    """Our value beside a published figure, both in the figure's unit; ``agreed_on``: by what the settings agree."""

    ours: Ours
    figure: Figure
    value: float
    agreed_on: str

    @property
    def gap(self) -> float:
        """Ours - published."""
        assert not isinstance(self.figure.value, tuple)
        return self.value - float(self.figure.value)


@dataclass(frozen=True)
class PublishedComparison:
    """Pairs that can be compared, and one line on each kind of figure that cannot."""

    matches: list[Match]
    left_out: list[str]


def compare(cells: Iterable[Cell]) -> PublishedComparison:
    """Own cells against all published figures."""
    matches: list[Match] = []
    left_out: list[str] = []
    for ours in means(cells):
        reason = _unpublished(ours)
        if reason:
            left_out.append(reason)
            continue
        for name, selected in _by_quantity(ours).items():
            pairs, reasons = _pairs(ours, selected)
            matches += pairs
            title = vocabulary().quantities[name].title
            left_out += [f"{ours.label}, {title}: {reason}" for reason in reasons]
    return PublishedComparison(matches, list(dict.fromkeys(left_out)))


def means(cells: Iterable[Cell]) -> list[Ours]:
    """Cells that differ in their seeds alone become one."""
    return [mean_of(group) for group in alike(cells)]


def alike(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells in groups that differ in their seeds alone."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        config = cell.config.model_dump(mode="json", exclude={"seed"})
        config["options"].pop("seed", None)
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(cell)
    return list(groups.values())


def mean_of(cells: Sequence[Cell]) -> Ours:
    """Such a group as one result."""
    config, first = cells[0].config, cells[0].metrics
    tokens = [cell.metrics.visual_tokens for cell in cells]
    return Ours(
        label=config.label,
        model=config.model,
        method=config.role,
        options=config.model_dump(mode="json")["options"],
        task=config.task,
        origin=config.origin,
        questions=first.size,
        total=first.total,
        seeds=len(cells),
        metrics={key: statistics.fmean(cell.metrics.metrics[key] for cell in cells) for key in first.metrics},
        tokens=VisualTokens(
            prompt=statistics.fmean(t.prompt for t in tokens),
            per_layer=[statistics.fmean(layer) for layer in zip(*(t.per_layer for t in tokens), strict=True)],
        ),
    )


def published_name(name: str) -> str | None:
    """The published model of a checkpoint, by the name of its hub repository or folder."""
    name_of_ours = name.rstrip("/").rsplit("/", 1)[-1].lower()
    for known, model in vocabulary().models.items():
        if name_of_ours in [checkpoint.rsplit("/", 1)[-1].lower() for checkpoint in model.checkpoints]:
            return known
    return None


def _unpublished(ours: Ours) -> str:
    """Why no figure can be compared with this result; empty if some may."""
    model = published_name(ours.model)
    if model is None:
        known = ", ".join(f"{m.title} ({m.checkpoints[0]})" for m in vocabulary().models.values())
        data = "embedded" if ours.origin == "embedded" else "real"
        return f"model {ours.model} on {data} data: published figures are of other models, {known}"
    asked_of = {q.questions for q in vocabulary().quantities.values() if q.task == ours.task}
    if not asked_of:
        return f"task {ours.task}: no published figure is known to be of the same metric"
    if ours.origin == "embedded":
        return f"{ours.task}: asked on embedded synthetic data, published on the real data; run with --data hub"
    (full,) = asked_of
    if (ours.questions, ours.total) != (full, full):
        share = f"{ours.questions} of {ours.total} questions asked"
        return f"{ours.task}: {share}, published on all {full}; ask all, without --limit"
    if all(figure.row.method != ours.method for figure in figures(model)):
        return f"{ours.method}: no published figures on {vocabulary().models[model].title}"
    return ""


def _by_quantity(ours: Ours) -> dict[str, list[Figure]]:
    """Figures of our model, method and task, by column."""
    selected = in_order(f for f in figures(published_name(ours.model), ours.method) if f.quantity.task == ours.task)
    return {name: [f for f in selected if f.name == name] for name in dict.fromkeys(f.name for f in selected)}


def _pairs(ours: Ours, selected: list[Figure]) -> tuple[list[Match], list[str]]:
    """Matches among the figures of one column, and reasons for those that are none."""
    quantity = selected[0].quantity
    if quantity.apart:
        return [], [f"{quantity.apart} ({_sources(selected)})"]
    tuned = [figure for figure in selected if figure.row.fine_tuned]
    ranges = [figure for figure in selected if isinstance(figure.value, tuple)]
    usable = [figure for figure in selected if not figure.row.fine_tuned and not isinstance(figure.value, tuple)]
    value = sum(ours.metrics[key] for key in quantity.keys) * (100.0 if quantity.unit == "%" else 1.0)
    agreed = [(figure, budget, departures(ours, figure)) for figure in usable if (budget := agreement(ours, figure))]
    pairs = [Match(ours, figure, value, budget) for figure, budget, strayed in agreed if not strayed]
    reasons = [f"published after fine-tuning ({_sources(tuned)})"] if tuned else []
    reasons += [f"only a range is known ({_sources(ranges)})"] if ranges else []
    apart = [figure for figure, _, strayed in agreed if strayed]
    if apart:
        options = ", ".join(dict.fromkeys(option for _, _, strayed in agreed for option in strayed))
        reasons.append(f"ours ran with {options}, which the source does not name ({_sources(apart)})")
    if usable and not agreed:
        settings = ", ".join(dict.fromkeys(figure.row.budget or "setting not said" for figure in usable))
        held = f"{ours.tokens.mean:.1f} tokens in the mean over layer inputs, {ours.tokens.last:.1f} after the last cut"
        reasons.append(f"published at other settings ({settings}), ours holds {held}")
    return pairs, reasons


def agreement(ours: Ours, figure: Figure) -> str:
    """By what our setting is the published one, in words; empty if it is another.

    A nominal budget of which the source does not say what it counts may be that after the last cut only where there is
    one cut: of several cuts, no paper names the last count alone.
    """
    row, tokens = figure.row, ours.tokens
    if row.method == "none":
        return "all tokens"
    if _has_options_of(ours, row):
        return ", ".join(f"{key}={_spelled(value)}" for key, value in row.options.items())
    if row.tokens is None:
        return ""
    counts = {
        "inputs": tokens.mean,
        "outputs": statistics.fmean([*tokens.per_layer[1:], tokens.last]),
        "after": tokens.last,
    }
    cuts = len(set(tokens.per_layer)) - 1
    unsaid = ["inputs", "outputs", *(["after"] if cuts <= 1 else [])]
    for counted in unsaid if row.counted == "not said" else [row.counted]:
        if abs(counts[counted] - row.tokens) <= TOLERANCE * row.tokens:
            return f"{counts[counted]:.1f} tokens, {COUNTED[counted]}"
    return ""


def departures(ours: Ours, figure: Figure) -> list[str]:
    """Options of ours that are not at their defaults and that the source does not name, in words.

    Where the budgets agree and not the options, those that set how much is kept say what the budget says.
    """
    method, row = list_methods().get(ours.method), figure.row
    named = {"seed", *row.options}
    if not _has_options_of(ours, row):
        named |= {option for knob in (method.knobs if method else ()) for option in (knob.name, *knob.replaces)}
    fields = {field.name: field.default for field in dataclasses.fields(method)} if method else {}
    strayed = []
    for option, value in ours.options.items():
        default = fields.get(option)  # an option that this version does not have is at its default if it is off
        usual = [*default] if isinstance(default, tuple) else default
        if option not in named and value != usual and not (option not in fields and not value):
            strayed.append(f"{option}={_spelled(value)} ({_spelled(usual)} by default)")
    return strayed


def _has_options_of(ours: Ours, row: Row) -> bool:
    """Whether ours has the options that the source gives; not where it gives none."""
    return bool(row.options) and all(ours.options.get(key) == value for key, value in row.options.items())


def _sources(selected: list[Figure]) -> str:
    return ", ".join(dict.fromkeys(figure.paper.name for figure in selected))


def _spelled(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def render(comparison: PublishedComparison, form: str = "text", width: int | None = None) -> str:
    """The comparison in the format ``text``, ``md``, ``csv`` or ``json``; ``width``: columns of a terminal for text."""
    return formatted(form, lambda: [_grid(comparison)], lambda: _records(comparison), width)


def _records(comparison: PublishedComparison) -> list[dict[str, Any]]:
    compared = [
        {
            "label": match.ours.label,
            "task": match.ours.task,
            "questions": match.ours.questions,
            "seeds": match.ours.seeds,
            "ours": match.value,
            "gap": match.gap,
            "budget": match.agreed_on,
            "left_out": None,
            "published": record(match.figure),
        }
        for match in comparison.matches
    ]
    return compared + [{"left_out": reason} for reason in comparison.left_out]


def _grid(comparison: PublishedComparison) -> Grid:
    lines = []
    notes: dict[str, int] = {}
    for match in comparison.matches:
        ours, figure = match.ours, match.figure
        marks = [str(notes.setdefault(note, len(notes) + 1)) for note in figure.remarks]
        numbers = [f"{match.value:.2f}", figure.printed, f"{match.gap:+.2f}", figure.quantity.unit]
        sizes = [str(ours.questions), str(ours.seeds)]
        budgets = [match.agreed_on, figure.row.budget or "all tokens"]
        benchmark = figure.quantity.title
        lines.append([ours.label, benchmark, *numbers, *sizes, *budgets, origin(figure), " ".join(marks)])
    header = ["method", "benchmark", "ours", "published", "gap", "unit", "questions", "seeds"]
    header += ["our setting", "published setting", "source", "notes"]
    numbered = [f"{number}  {note}" for note, number in notes.items()]
    left_out = [f"Not compared: {reason}." for reason in comparison.left_out]
    return Grid("Ours against published figures", header, lines, [RULE, *numbered, *left_out])
