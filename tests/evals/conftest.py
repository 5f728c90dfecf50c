"""Prompts on which budgets are solved."""

import pytest
from budgeting import ROWS
from support import make_batch
from visibench.evals.compute.budget import Prompts
from visibench.models import LoadedModel


@pytest.fixture(scope="module")
def prompts(llava):
    samples = make_batch(ROWS)
    return Prompts(LoadedModel("small", llava, None), samples, samples[0])
