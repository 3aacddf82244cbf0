r"""How well a variational autoencoder infers: models, guides and measurements in Pyro."""

from pyro_gpvae.core._errors import NonFiniteError, UnsupportedError
from pyro_gpvae.core._programs import Program
from pyro_gpvae.data.images import ImageData, load_data, memory_mapped
from pyro_gpvae.evaluation.annealing import annealed_evidence, bidirectional
from pyro_gpvae.evaluation.gap import Gap, decompose
from pyro_gpvae.evaluation.importance import Evidence, evidence_curve, log_evidence, log_weights
from pyro_gpvae.evaluation.reference import ReferenceEvidence, reference_evidence
from pyro_gpvae.model.distributions import MarginalPosterior
from pyro_gpvae.model.elbo import Block, MeanFieldELBO, PerImage, TraceELBO, elbo_terms
from pyro_gpvae.model.guide import available_guides, load_guide, make_guide
from pyro_gpvae.model.image_model import ImageModel, initial_sigma
from pyro_gpvae.model.networks import build_decoder, build_encoder
from pyro_gpvae.model.stratified import StratifiedELBO
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.folder import Run, load_run
from pyro_gpvae.runs.seeds import resume_seeds, train_seeds
from pyro_gpvae.runs.train import resume_run, train_run
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.loop import History, fit

__version__ = "0.1.0"

__all__ = [
    "Block",
    "Checkpoints",
    "Evidence",
    "Gap",
    "History",
    "ImageData",
    "ImageModel",
    "MarginalPosterior",
    "MeanFieldELBO",
    "NonFiniteError",
    "PerImage",
    "Program",
    "ReferenceEvidence",
    "Run",
    "RunConfig",
    "StratifiedELBO",
    "TraceELBO",
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
    "load_guide",
    "load_run",
    "log_evidence",
    "log_weights",
    "make_guide",
    "memory_mapped",
    "reference_evidence",
    "resume_run",
    "resume_seeds",
    "train_run",
    "train_seeds",
]
