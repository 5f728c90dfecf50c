"""``python -m visibench.methods``: the table of methods in docs/methods.md."""

from ..engine.contract import Method
from .registry import list_methods


def acts(method: type[Method]) -> str:
    """Where a method acts, as a reader would say it."""
    places = {
        "image": "image",
        "tower": "vision blocks",
        "vision": "vision features",
        "projector": "projected features",
    }
    named = [places[point] for point in method.hook_points if point in places]
    if {"decoder", "attention"} & set(method.hook_points):
        named.append("decoder layers")
    return ", ".join(named) or "–"


def markdown() -> str:
    """All registered methods as a Markdown table."""
    rows = ["| name | method | acts on | positions | paper | authors' code |", "|---|---|---|---|---|---|"]
    for name, method in sorted(list_methods().items()):
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        source = f"{method.source} ✓" if method.source else ""
        positions = method.__dataclass_fields__["positions"].default
        rows.append(f"| `{name}` | {method.title} | {acts(method)} | {positions} | {paper} | {source} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown())
