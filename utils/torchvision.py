"""Make a CUDA build of torchvision importable beside a CPU build of torch.

The PyPI wheel of torchvision carries operators compiled for the CUDA build of torch. Beside a CPU torch they do
not load, and ``import torchvision`` then dies while registering their fake kernels (``operator torchvision::nms
does not exist``), taking transformers and lmms-eval with it. Predefining the schemas lets the import pass:
transforms work as usual, and a call of one of the missing kernels says so.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_ROI = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_CONV = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
_FIVE = "Tensor weight, Tensor offset, Tensor mask, Tensor bias"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, {_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_ROI}, {_SIZE}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align(Tensor input, Tensor rois, {_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor mapping, {_ROI}, int sampling_ratio, {_SIZE}) -> Tensor",
    f"roi_pool(Tensor input, Tensor rois, {_ROI}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_ROI}, {_SIZE}) -> Tensor",
    f"ps_roi_pool(Tensor input, Tensor rois, {_ROI}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor mapping, {_ROI}, {_SIZE}) -> Tensor",
    f"deform_conv2d(Tensor input, {_FIVE}, {_CONV}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, {_FIVE}, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_library: Any = None


def ensure_importable() -> bool:
    """Predefine the operator schemas if torchvision's own operators do not load; return whether that was needed."""
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    operators = Path(spec.origin).parent / "_C.so" if spec is not None and spec.origin else None
    if operators is None or not operators.exists():
        return False
    import torch

    try:
        torch.ops.load_library(str(operators))
    except OSError:
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        return True
    return False


class _Cure(MetaPathFinder):
    """Finds nothing itself; the first time that torchvision is looked for, its schemas are there before it is found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            ensure_importable()


def install() -> None:
    """Cure torchvision when it is first imported, by whomever; imports nothing by itself."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Cure) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Cure())
