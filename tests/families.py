"""Every family of guides on the linear toy model, for what has to hold for all of them."""

from __future__ import annotations

from typing import Any

import torch
from toy import linear_encoder, linear_model

from pyro_gpvae import ImageModel, make_guide

#: Families whose training step is a pure function of tensors: nothing in it reads the device.
FAMILIES = [
    "vae",
    "gp",
    "gp:covariance=full",
    "gp:estimator=weights",
    "gp:estimator=weights,covariance=full",
    "gp:estimator=marginal,num_nodes=8",
    "gp:features=own",
    "full",
    "lowrank:1",
    "iaf",
    "hf",
    "me:3",
    "rme:3",
    "sa:2,line_search=False",
    "iterative:2",
    "newton:2",
    "newton:1,covariance=diagonal,safeguard=True",
]
#: Those that read the device: a Cholesky factor may fail, a search looks at what it found.
READERS = ["sa:1", "vlae:1", "vlae:1,step=damped"]


def make(spec: str, dtype: torch.dtype = torch.float64) -> tuple[ImageModel, Any]:
    """The toy model and a guide of a family, always the same."""
    torch.manual_seed(0)
    model = linear_model().to(dtype)
    guide = make_guide(spec, model, encoder=linear_encoder()).to(dtype)
    return model.train(), guide.train()
