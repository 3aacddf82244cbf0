r"""The commands of ``pyro-gpvae``: one a file, its options a dataclass, its work ``run()``."""

from pyro_gpvae.cli.demo import Demo
from pyro_gpvae.cli.evaluate import Evaluate
from pyro_gpvae.cli.gap import Gap
from pyro_gpvae.cli.generate import Generate
from pyro_gpvae.cli.guides import Guides
from pyro_gpvae.cli.results import Results
from pyro_gpvae.cli.train import Train
from pyro_gpvae.cli.uncertainty import Uncertainty

__all__ = ["Demo", "Evaluate", "Gap", "Generate", "Guides", "Results", "Train", "Uncertainty"]
