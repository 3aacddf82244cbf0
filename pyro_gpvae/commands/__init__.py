r"""The commands of ``pyro-gpvae``: one a file, its options a dataclass, its work ``run()``."""

from pyro_gpvae.commands.demo import Demo
from pyro_gpvae.commands.evaluate import Evaluate
from pyro_gpvae.commands.gap import Gap
from pyro_gpvae.commands.generate import Generate
from pyro_gpvae.commands.guides import Guides
from pyro_gpvae.commands.results import Results
from pyro_gpvae.commands.train import Train
from pyro_gpvae.commands.uncertainty import Uncertainty

__all__ = ["Demo", "Evaluate", "Gap", "Generate", "Guides", "Results", "Train", "Uncertainty"]
