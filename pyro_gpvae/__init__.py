r"""Amortised inference for variational autoencoders, as models, guides and measurements in Pyro.

The names below are all that most users need; each is imported at its first use. The subpackages
hold the rest:

``core``
    Errors, seeds, files and the base class :class:`Program` that the other subpackages share.
``data``
    Images as uint8 tensors: data sets by name or file, and their conversion to floats.
``model``
    :class:`ImageModel`, likelihoods, networks, the ELBO of eq. (2), the marginal posterior of
    eq. (7), and the contract that a guide fulfils (:mod:`pyro_gpvae.model.guide`).
``training``
    :func:`fit`, its training step, and checkpoints.
``evaluation``
    Estimates of log p(x), the inference gap, uncertainty scores and generated images.
``runs``
    Run folders: train, resume, evaluate and compare.
``plots``
    Functions from arrays and tables to matplotlib figures.
``testing``
    Checks for your own guides, such as :func:`pyro_gpvae.testing.check_guide`.
``cli``
    The command ``pyro-gpvae``.

Guides are in the package ``guides``, which this package never imports by name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_gpvae.core._errors import NonFiniteError, UnsupportedError
    from pyro_gpvae.core._programs import Program
    from pyro_gpvae.data.images import ImageData, load_data
    from pyro_gpvae.evaluation.annealing import annealed_evidence, bidirectional
    from pyro_gpvae.evaluation.gap import decompose
    from pyro_gpvae.evaluation.importance import evidence_curve, log_evidence, log_weights
    from pyro_gpvae.evaluation.reference import reference_evidence
    from pyro_gpvae.model._pairing import pair
    from pyro_gpvae.model.elbo import PerImage, elbo_terms
    from pyro_gpvae.model.guide import available_guides, make_guide
    from pyro_gpvae.model.image_model import ImageModel, initial_sigma
    from pyro_gpvae.model.marginal_posterior import MarginalPosterior
    from pyro_gpvae.model.networks import build_decoder, build_encoder
    from pyro_gpvae.model.unconstrained import UnconstrainedModel
    from pyro_gpvae.runs.config import RunConfig
    from pyro_gpvae.runs.evaluate import evaluate_run
    from pyro_gpvae.runs.folder import load_run
    from pyro_gpvae.runs.train import resume_run, train_run
    from pyro_gpvae.training.checkpoint import Checkpoints
    from pyro_gpvae.training.loop import fit

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "ImageData",
    "ImageModel",
    "MarginalPosterior",
    "NonFiniteError",
    "PerImage",
    "Program",
    "RunConfig",
    "UnconstrainedModel",
    "UnsupportedError",
    "annealed_evidence",
    "available_guides",
    "bidirectional",
    "build_decoder",
    "build_encoder",
    "decompose",
    "elbo_terms",
    "evaluate_run",
    "evidence_curve",
    "fit",
    "initial_sigma",
    "load_data",
    "load_run",
    "log_evidence",
    "log_weights",
    "make_guide",
    "pair",
    "reference_evidence",
    "resume_run",
    "train_run",
]

#: The module of each public name.
_MODULES = {
    "core._errors": ("NonFiniteError", "UnsupportedError"),
    "core._programs": ("Program",),
    "data.images": ("ImageData", "load_data"),
    "evaluation.annealing": ("annealed_evidence", "bidirectional"),
    "evaluation.gap": ("decompose",),
    "evaluation.importance": ("evidence_curve", "log_evidence", "log_weights"),
    "evaluation.reference": ("reference_evidence",),
    "model._pairing": ("pair",),
    "model.marginal_posterior": ("MarginalPosterior",),
    "model.elbo": ("PerImage", "elbo_terms"),
    "model.guide": ("available_guides", "make_guide"),
    "model.image_model": ("ImageModel", "initial_sigma"),
    "model.networks": ("build_decoder", "build_encoder"),
    "model.unconstrained": ("UnconstrainedModel",),
    "runs.config": ("RunConfig",),
    "runs.evaluate": ("evaluate_run",),
    "runs.folder": ("load_run",),
    "runs.train": ("resume_run", "train_run"),
    "training.checkpoint": ("Checkpoints",),
    "training.loop": ("fit",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        """Imports a public name at its first use (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = found  # the next use does not come here
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
