"""How often each method of a run answers as the dense model does, task by task, and what it executes for that.

    python benchmarks/agreement.py RUN --csv FIGURES.csv
    python benchmarks/agreement.py FIGURES.csv

Prints a table; ``--csv`` keeps its figures. Intervals are 95 %, clustered by image. The seeds of a control count
together.
"""

import argparse
from pathlib import Path
from statistics import fmean

import pandas as pd
from visibench.results.statistics.intervals import estimate
from visibench.results.statistics.metrics import loyalty
from visibench.results.store.store import Store

DENSE = "none"


def figures(run: Path) -> pd.DataFrame:
    """A row a method and task: shares in per cent, multiply-adds of a prefill in 10⁹, T over decoder layers."""
    cells = Store(run).cells()
    dense = {cell.config.task: cell.samples() for cell in cells if cell.config.method == DENSE}
    by: dict[tuple[str, str], list] = {}
    for cell in cells:
        by.setdefault((cell.config.label, cell.config.task), []).append(cell)
    rows = []
    for (label, task), seeds in by.items():
        samples = [cell.samples() for cell in seeds]
        same = estimate(loyalty(dense[task], samples))
        every = pd.concat(samples)
        rows.append(
            {
                "method": label,
                "options": str(seeds[0].config.options),
                "task": task,
                "seeds": len(seeds),
                "questions": same.questions,
                "as dense": 100 * same.value,
                "low": 100 * same.low,
                "high": 100 * same.high,
                "GMACs": every["executed_macs"].mean() * 1e-9,
                "T": every["visual_tokens"].map(lambda layers: sum(layers) / len(layers)).mean(),
            }
        )
    return pd.DataFrame(rows).round(4)


def table(found: pd.DataFrame) -> str:
    """As Markdown, methods by what they execute."""
    tasks = list(dict.fromkeys(found["task"]))
    found = found.set_index(["method", "task"])
    order = found.groupby("method")["GMACs"].mean().sort_values(ascending=False).index
    lines = ["| method | " + " | ".join(tasks) + " | GMACs: " + ", ".join(tasks) + " | T |"]
    lines.append("|---|" + "---:|" * (len(tasks) + 2))
    for method in order:
        asked = {task: found.loc[method, task] for task in tasks if (method, task) in found.index}
        shares = [_share(asked[task]) if task in asked else "–" for task in tasks]
        costs = ", ".join(f"{asked[task]['GMACs']:.3f}" if task in asked else "–" for task in tasks)
        tokens = fmean(one["T"] for one in asked.values())
        lines.append(f"| `{method}` | " + " | ".join(shares) + f" | {costs} | {tokens:.1f} |")
    return "\n".join(lines)


def _share(one: pd.Series) -> str:
    return f"{one['as dense']:.1f} [{one['low']:.1f}, {one['high']:.1f}]"


def main() -> None:
    """Read, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    found = figures(given.source) if given.source.is_dir() else pd.read_csv(given.source)
    if given.csv:
        found.to_csv(given.csv, index=False)
    print(table(found))


if __name__ == "__main__":
    main()
