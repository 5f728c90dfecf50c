"""Prompts on which budgets are solved, a task, and a small sweep."""

import pytest
from budgeting import ROWS
from support import make_batch
from visibench.evals.compute.budget import Prompts
from visibench.evals.tasks.tasks import Task, load_tasks
from visibench.models import LoadedModel


@pytest.fixture(scope="module")
def prompts(llava):
    samples = make_batch(ROWS)
    return Prompts(LoadedModel("small", llava, None), samples, samples[0])


@pytest.fixture
def pope(disk_data) -> Task:
    return load_tasks(["pope"], str(disk_data))[0]


@pytest.fixture
def settings(checkpoint, disk_data) -> dict:
    methods = ["fastv:layer=8,keep=0.9", {"name": "random", "keep": 0.1, "seeds": [0, 1]}]
    where = {"model": str(checkpoint), "data": str(disk_data), "tasks": ["gqa", "pope"], "methods": methods}
    return where | {"timing": None, "batch_size": 4, "limit": 4}
