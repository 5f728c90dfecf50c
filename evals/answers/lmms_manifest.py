"""What lmms-eval finds under its entry-point group ``lmms_eval.models``: the model called ``visibench``.

lmms-eval loads this while it is itself being imported, for whatever model is asked for, so nothing heavy is imported.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Name and class of the model; see :class:`visibench.evals.answers.lmms_model.Visibench`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="visibench", simple_class_path="visibench.evals.answers.lmms_model.Visibench")
