"""Every method that the tests run, as its examples say; registering one puts it in."""

import pytest
import visibench
from probes import PROBES
from visibench.evals.settings.method_spec import parse, spell

METHODS = visibench.list_methods()
REGISTERED = [parse(spell(cls, options)) for cls in METHODS.values() for options in cls.examples]
EVERYTHING = {
    name: parse(spell(cls, cls.everything)) for name, cls in METHODS.items() if cls.everything is not None
}  # what keeps all tokens
CASES = REGISTERED + PROBES
PLAINEST = [parse(spell(cls, cls.examples[0])) for cls in METHODS.values()]
FASTV = visibench.load_method("fastv", keep=0.5)
every_method = pytest.mark.parametrize("method", PLAINEST, ids=str)
