"""A run folder, and one in which methods compete."""

import numpy as np
import pytest
from tabled import answered
from visibench.results.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "run")


@pytest.fixture
def contest(store) -> Store:
    """At the larger budget tome leads clearly, at the smaller one dart only a little; vtw stands alone."""
    rng = np.random.default_rng(0)
    ease = rng.random(150)
    answered(store, "none", ease < 0.95, 16.0)
    for method, share, tokens in (("tome", 0.9, 8.0), ("fastv", 0.6, 8.0), ("divprune", 0.5, 7.0), ("vtw", 0.9, 2.0)):
        answered(store, method, ease < share, tokens)
    answered(store, "dart", (ease < 0.5) ^ (rng.random(150) < 0.1), 4.0)
    answered(store, "visionzip", (ease < 0.5) ^ (rng.random(150) < 0.1), 4.0)
    return store
