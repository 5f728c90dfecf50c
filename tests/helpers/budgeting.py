"""Methods with knobs, prompts to solve their budgets on, and a clock that reads what T says."""

import torch
import visibench
from support import make_batch
from visibench.evals.compute.timing import Timing
from visibench.evals.settings import method_spec
from visibench.evals.settings.method_spec import decided

ROWS = [(5, 9, 1), (2, 20, 1)]
TURNED = [cls for cls in visibench.list_methods().values() if cls.knobs]


def open_options(cls, example=0):
    """Options of an example without those that a budget decides."""
    _, options = method_spec.split(method_spec.spell(cls, cls.examples[example]))
    return {key: value for key, value in options.items() if key not in decided(cls.knobs[0])}


def traced(model, method, rows=ROWS):
    """T, sample by sample."""
    counts = []
    for sample in make_batch(rows):
        with torch.no_grad(), visibench.prune(model, method) as session:
            model(**sample)
        counts.append(session.trace.visual_counts().double().mean())
    return float(torch.stack(counts).mean())


class Clock:
    """Takes 10 ms and 1 ms for each visual token of T, and reads ``noise`` ms more or less."""

    def __init__(self, prompts, noise):
        self.prompts, self.noise, self.asked = prompts, noise, []

    def __call__(self, loaded, method, inputs, **settings):
        self.asked.append(method)
        median = 10 + self.prompts.tokens(method)
        times = (median - self.noise, median, median + self.noise)
        return Timing(times, warmup=1, batch_size=1, device="cpu")
