r"""Import torchvision, also where its compiled operators do not load."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

# A torch.library.Library withdraws its operators when it is collected, so it is kept here.
_declared: list[torch.library.Library] = []


def import_torchvision() -> Any:
    r"""Returns the module `torchvision`, imported on first use.

    A torchvision built for CUDA cannot load its compiled operators beside a CPU build of torch, and
    then its import fails: it describes the shapes of two operators, `nms` and `qnms`, that do not
    exist. Only when exactly that happens, both are declared without an implementation, and the
    import is tried again. Data sets, transforms and `make_grid` then work; `torchvision.io`
    and the operators on boxes do not.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: torchvision fails to import for any other reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    # the failed import leaves submodules behind that hold on to the failure
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")
