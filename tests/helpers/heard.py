"""Events of a sweep, kept and checked."""

from visibench.evals.sweeps.events import Reporter


class Heard(Reporter):
    """Keeps all events; calls ``act`` at the first of a kind."""

    def __init__(self, kind: str = "", act=None) -> None:
        self.events, self.kind, self.act = [], kind, act

    def __call__(self, event) -> None:
        self.events.append(event)
        if self.act and event.event == self.kind:
            act, self.act = self.act, None
            act()

    def of(self, *kinds: str) -> list:
        return [event for event in self.events if event.event in kinds]


def check_events(heard: Heard, cells: int) -> None:
    """Every cell ends once, and the numbers count through."""
    assert sorted(event.cell.number for event in heard.of("cell_finished")) == list(range(1, cells + 1))
    assert len({event.cell.folder for event in heard.of("cell_finished")}) == cells


def check_interrupted(heard: Heard, folder) -> None:
    """As if there were one process, and what it had answered is kept."""
    assert len([note for note in heard.of("note") if note.text.startswith("Stopping")]) == 1
    assert list(folder.glob("cells/*/answers*"))
    assert not list(folder.glob("cells/*/metrics.json"))
