r"""Training of a Pyro model and guide on images, by Adam on eq. (2) of the paper's supplement.

* :func:`fit` is the loop over epochs and minibatches (``loop.py``, ``_batches.py``).
* :class:`TrainingStep` is one step of Adam (``step.py``). It is eager unless a compiled step is
  asked for (``_compiled.py``); ``fit`` would work without this file.
* :class:`Checkpoints` is where a training is saved (``checkpoint.py``), and ``_state.py`` lists
  what is saved. ``_divergence.py`` names the images and the term of a loss that is not finite.

This package knows nothing of run folders, evaluation or particular guides. It imports ``core``,
``data`` and ``model``; ``guides``, ``testing``, ``runs`` and everything above them may import it.
"""

from pyro_gpvae.training._history import History
from pyro_gpvae.training.checkpoint import Checkpoints
from pyro_gpvae.training.loop import fit
from pyro_gpvae.training.step import TrainingStep

__all__ = ["Checkpoints", "History", "TrainingStep", "fit"]
