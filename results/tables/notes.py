"""What a reader must know next to the numbers of a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..statistics.inference import ALPHA, BASELINES, DENSE, DOWNSAMPLE, POOLING, RANDOM
from ..store.records import ScoreRecord
from .columns import GROUPS, Column, number
from .tables import Row, Table


def heading(table: Table, place: int, count: int) -> list[str]:
    """Which of ``count`` tables this is and in what it differs; nothing for the only one."""
    if count == 1:
        return []
    differs = ", ".join(f"{key} = {value}" for key, value in table.differs.items()) or "limit"
    return [f"Table {place} of {count}, not to be compared with the others: {differs}"]


def notes(table: Table, chosen: Sequence[Column], bold: str) -> list[str]:
    """Questions, statistics, units, timing, what was not run, and origin, as far as the ``chosen`` columns need them.

    ``bold``: how the best scores are marked.
    """
    names = {column.name for column in chosen}
    asked = ", ".join(f"{task} {q.asked} of {q.of} ({q.origin})" for task, q in table.questions.items())
    lines = [f"Questions: {asked}.{' SUBSET: these are no full-set scores.' if table.is_subset else ''}"]
    lines += [f"{task}: {q.note}." for task, q in table.questions.items() if q.note]
    lines += _inference(table)
    lines += _best(table, bold)
    if "loyalty" in names and any(row.evidence.loyalty for row in table.rows):
        lines.append("Loyalty: mean over tasks of the share of answers that equal the dense model's.")
    lines += _retained(table) if "retained" in names else []
    if names & {"tokens", "last"}:
        prompt = table.rows[0].tokens.prompt
        lines.append(
            f"Visual tokens: T = mean over decoder-layer inputs, and at the last layer's, of {prompt:g} in the prompt."
        )
    if "compute" in names:
        lines.append("FLOPs: one multiply-add = 1, all that a prefill executed, mean over questions.")
    lines += _deviations(table)
    lines += _groups(table) if names & {f"group_{name.lower()}" for name in GROUPS} else []
    lines += _timing(table) if "prefill" in names else []
    lines += _latency(table) if "latency" in names else []
    lines += [f"Remarks: {'; '.join(table.remarks)}."] if table.remarks else []
    lines += _sharing(table)
    return [*lines, *_baselines(table), origin(table)]


def _sharing(table: Table) -> list[str]:
    """In which cells latency and seconds leave out some of the tower: these, or all but those, whichever is shorter."""
    shared = [cell.metrics.reused_images > 0 for row in table.rows for cell in row.cells]
    if not any(shared):
        return []
    did = "; ".join(filter(None, (row.named(lambda cell: cell.metrics.reused_images > 0) for row in table.rows)))
    did_not = "; ".join(filter(None, (row.named(lambda cell: not cell.metrics.reused_images) for row in table.rows)))
    which = did if len(did) <= len(did_not) else f"all but {did_not}"
    where = f"{sum(shared)} of {len(shared)} cells ({which})" if did_not else f"all {len(shared)} cells"
    return [f"Vision features of an image were reused in {where}. FLOPs and prefill times count the tower in full."]


def _groups(table: Table) -> list[str]:
    small = sorted({row.evidence.groups_by for row in table.rows if row.evidence.groups_by})
    if not small:
        return ["Groups of difficulty need rows of none and downsample."]
    return [
        "A and B: mean score over tasks, with the number of questions, on those that the dense model answers right and "
        f"{' or '.join(small)} (of downsample the row nearest in T) wrong (A) or right as well (B), as in VTC-Bench."
    ]


def _timing(table: Table) -> list[str]:
    timing = table.facts["timing"]
    if not timing:
        return []
    repeats = f"{timing['repeats']} runs a task and seed after {timing['warmup']} to warm up"
    return [f"Prefill: batch {timing['batch_size']}, median ± interquartile range, {repeats}."]


def _latency(table: Table) -> list[str]:
    """What the time of a question is, and what is not in it."""
    found = [row.latency for row in table.rows if row.latency]
    if not found:
        return ["Latency: not recorded by the visibench that made these cells."]
    batches = ", ".join(f"{size:g}" for size in sorted({one.batch for one in found}))
    reused = sum(one.reused for one in found)
    left_out = f"; {reused} are of cells that reused vision features, which leaves out the tower" if reused else ""
    return [
        "Latency: median over questions, their number in brackets, of the time in which the batch of a question was "
        f"answered, from inputs on the device to its last token, measured once, without warm-up{left_out}. Questions "
        f"in such a batch: {batches} (median)."
    ]


def _inference(table: Table) -> list[str]:
    """How intervals and marks came about, and what this many questions can show at all."""
    rows, lines = table.rows, []
    images = {task: e.images for row in rows for task, by in row.evidence.scores.items() for e in by.values()}
    if images:
        counts = ", ".join(f"{task} {count}" for task, count in sorted(images.items()))
        interval = f"its 95 % interval, clustered by image ({counts} images); limits in CSV and JSON"
        sides = "or + and − where the sides differ by more than a quarter"
        lines.append(f"± after a score or loyalty, {sides}: {interval}.")
    verdicts = {
        name: [v for row in rows for by in row.evidence.against[name].values() for v in by.values()]
        for name in ("dense", "random")
    }
    if any(verdicts.values()):
        tests = " or ".join(sorted({v.comparison.test for found in verdicts.values() for v in found}))
        references = " and ".join(f"{name[0]} = {name}" for name, found in verdicts.items() if found)
        lines.append(
            f"↑ higher, ↓ lower, = tied (no difference shown), {references}: same questions, {tests}, p < {ALPHA:g} "
            "after Holm over the rows, for each score and reference apart."
        )
    unmatched = [row for row in rows if row.evidence.nearest and not _matched(row)]
    if verdicts["random"]:
        apart = f"; rows more than 10 % away from it in T: {len(unmatched)}" if unmatched else ""
        lines.append(f"Random is the random row with the nearest T, mean over its seeds{apart}.")
    lines += _floors(table)
    lacking = sorted(
        {
            f"{task} {score.title}"
            for task, scores in table.columns.items()
            for score in scores
            if _lacks(table, task, score)
        }
    )
    if lacking:
        lines.append(f"No interval, no marks: {', '.join(lacking)} cannot be recomputed from single questions.")
    return lines


def _best(table: Table, bold: str) -> list[str]:
    """What the groups are and what marks the best, where a group has rows to compare."""
    groups = len({row.evidence.budget for row in table.rows} - {None})
    lines = ["Groups: rows whose T differ by a quarter at most."] if groups > 1 else []
    if any(row.evidence.best for row in table.rows):
        tested = f"p < {ALPHA:g} against each of them after Holm over the groups, for each score apart"
        lines.append(f"{bold}: higher than all others of its group, same questions, {tested}.")
    return lines


def _retained(table: Table) -> list[str]:
    if not any(row.retained for row in table.rows):
        return []
    interval = (
        " ± its 95 % interval (paired and clustered by image: delta method, for metrics that are no means the "
        "jackknife; tasks taken as independent)"
        if any(row.evidence.retained for row in table.rows)
        else ""
    )
    missed = sorted(
        task for row in table.rows if row.method == DENSE for task in row.scores if not _headline(table, row, task)
    )
    left_out = f" It leaves out {', '.join(missed)}: the dense score is 0." if missed else ""
    return [f"Retained: mean over tasks of score / dense score{interval}.{left_out}"]


def _deviations(table: Table) -> list[str]:
    """What the standard deviations in brackets are about."""
    seeds = sorted({len(row.seeds) for row in table.rows} - {1})
    parts = [f"of scores and retained over {' or '.join(map(str, seeds))} seeds"] if seeds else []
    if any(row.evidence.spread for row in table.rows):
        parts.append("of visual tokens and compute over the questions of a task, where a method adapts to them")
    return [f"sd: standard deviation, {'; '.join(parts)}."] if parts else []


def _baselines(table: Table) -> list[str]:
    """Which rows a reader would expect and misses, and what adds them to a sweep."""
    have = {row.method for row in table.rows}
    missing = [method for method in BASELINES if method not in have]
    means = {row.evidence.budget: row.tokens.mean for row in reversed(table.rows) if row.evidence.budget is not None}
    budgets = ", ".join(f"{{tokens: {mean:.4g}}}" for _, mean in sorted(means.items()))
    entries = {
        DENSE: "none",
        RANDOM: f"{{name: random, budget: [{budgets}], seeds: [0, 1, 2]}}",
        POOLING: f"{{name: pooling, budget: [{budgets}]}}",
        DOWNSAMPLE: f"{{name: downsample, budget: [{budgets}]}}",
    }
    if not missing or not budgets:
        return []
    lines = ", ".join(entries[method] for method in missing)
    itself = "references: true, or " if set(missing) - {DENSE} else ""
    return [f"Not run: {', '.join(missing)}. A sweep adds what the model can carry with {itself}methods: [{lines}]."]


def _matched(row: Row) -> bool:
    return abs(row.tokens.mean - (row.evidence.nearest or 0.0)) <= 0.1 * row.tokens.mean


def _floors(table: Table) -> list[str]:
    """Which differences from dense so many questions can show, by task."""
    floors, blind = [], []
    for task, (score, *_) in table.columns.items():
        found = [v for row in table.rows if (v := row.evidence.against["dense"].get(task, {}).get(score.key))]
        shown = [v.detectable for v in found if v.detectable is not None]
        if shown:
            floors.append(f"{task} {number(statistics.median(shown), score.maximum)}")
        elif found:
            blind.append(f"{task} ({found[0].comparison.images} images)")
    said = "Smallest true difference from dense found with 80 % power (at Holm's strictest level; median over rows)"
    return [f"{said}: {', '.join(floors)}."] * bool(floors) + [
        f"Too few questions to find any: {', '.join(blind)}."
    ] * bool(blind)


def _lacks(table: Table, task: str, score: ScoreRecord) -> bool:
    return any(task in row.scores and score.key not in row.evidence.scores.get(task, {}) for row in table.rows)


def _headline(table: Table, row: Row, task: str) -> float:
    return row.scores[task][table.columns[task][0].key].mean


def origin(table: Table) -> str:
    """Model, machine and versions in one line."""
    model, versions = table.facts["environment"]["model"], table.facts["environment"]["versions"]
    named = ("visibench", "lmms-eval", "transformers", "torch")
    commits = {"visibench": f" (commit {' and '.join(table.commits)})" if table.commits else ""}
    packages = ", ".join(f"{name} {versions[name]}{commits.get(name, '')}" for name in named if name in versions)
    threads = f"{model.get('threads')} thread{'' if model.get('threads') == 1 else 's'}"
    return (
        f"Model {table.facts['model']}: {model.get('dtype')}, {model.get('attention')} attention, "
        f"{model.get('image_processor')}, {model.get('device')} ({model.get('hardware')}, "
        f"{threads}); {packages}."
    )
