"""The analysis of every family with a line of test: what is lost without images is what its own layers lose."""

from types import SimpleNamespace

import numpy as np
import pytest
from by_hand import by_hand, given_densely
from decoders import IMAGE, KINDS, decoder_model, row_samples
from processors import tokenizer
from visibench.analysis.stages import PARTS, StageAnalysis
from visibench.evals.tasks.tasks import load_tasks
from visibench.models import LoadedModel

pytestmark = pytest.mark.slow
ROWS = (0, 1)
"""Of the family's rows, those that are asked about images."""


class Given(LoadedModel):
    """A miniature that is handed a row of its family for each question, one at a time, whatever it is asked."""

    def inputs(self, questions, images, key=None):
        (question,) = questions
        known = self.__dict__.setdefault("known", {})
        number = known.setdefault(question, len(known))
        return row_samples(self.name)[ROWS[number]]


def given(kind):
    bytes_alone = tokenizer(["<image>"])
    processor = SimpleNamespace(
        tokenizer=bytes_alone, batch_decode=bytes_alone.batch_decode, image_processor=SimpleNamespace()
    )
    return Given(kind, decoder_model(kind), processor)


@pytest.fixture(scope="module")
def tasks(disk_data):
    return load_tasks(["pope"], str(disk_data))


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_measured(kind, tasks):
    loaded = given(kind)
    depth = loaded.geometry.layers
    record = StageAnalysis(loaded, tasks, (1, depth - 1), PARTS, limit=len(ROWS), batch_size=1).run()
    quantities = {curve.quantity.partition("_")[0] for curve in record.curves}
    assert quantities == {"last", "text", "value", "contribution", "lens"}
    assert all(np.isfinite([mean.value for mean in curve.means]).all() for curve in record.curves)
    kl = {(w.kind, w.first): w.effects["pope"]["kl"].value for w in record.windows}
    for layer in (1, depth - 1):
        assert kl["dropped", layer] == pytest.approx(without_images(kind, layer), rel=1e-3, abs=1e-6)
    assert {found.by for found in record.stages} == {"next token", "answer"}


def without_images(kind, layer):
    """KL of the next token, nats, mean over rows, when the model's own layers go on from ``layer`` without images."""
    model, divergences = decoder_model(kind), []
    scale = getattr(model.config.get_text_config(), "logit_scale", 1)
    for row in ROWS:
        sample = row_samples(kind)[row]
        visual = sample["input_ids"][0] == IMAGE
        rest = by_hand(model, given_densely(model, sample), layer, ~visual, visual, "keep")
        dense = model(**sample).logits[0, -1].double().log_softmax(-1)
        blind = (model.lm_head(rest)[0] * scale).double().log_softmax(-1)
        divergences.append(float((dense.exp() * (dense - blind)).sum()))
    return sum(divergences) / len(divergences)
