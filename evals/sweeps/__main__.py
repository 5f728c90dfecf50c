"""``python -m visibench.evals.sweeps``: the keys of configurations, for docs/sweeps.md."""

from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from ...results.store.records import TimingConfig
from ..compute.profile import ProfileConfig
from ..settings.config import Config, MethodEntry
from .config import SweepConfig

END = "...\n"  # what YAML puts behind a bare value
TABLES: dict[str, tuple[type[BaseModel], type[BaseModel] | None]] = {
    "A sweep": (SweepConfig, None),
    "An entry of `methods:`, beside the options of the method": (MethodEntry, None),
    "`timing:` of a sweep": (TimingConfig, None),
    "A profile, beside `model`, `methods` and what else sweeps share with it": (ProfileConfig, Config),
}


def markdown() -> str:
    """A table of all keys with their defaults and meanings for each kind of mapping that users write."""
    parts = []
    for title, (kind, known) in TABLES.items():
        fields = {
            name: field for name, field in kind.model_fields.items() if not known or name not in known.model_fields
        }
        rows = [
            f"| `{name}` | {_default(field)} | {' '.join((field.description or '').split())} |"
            for name, field in fields.items()
        ]
        parts.append("\n".join([f"**{title}**", "", "| key | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = TypeAdapter(Any).dump_python(field.default, mode="json")
    if value in (None, "", [], {}):
        return "–"
    return f"`{yaml.safe_dump(value, default_flow_style=True, sort_keys=False).removesuffix(END).strip()}`"


if __name__ == "__main__":
    print(markdown())
