r"""The commands of ``pyro-gpvae``: one a file, its options a dataclass, its work ``run()``."""

from pyro_gpvae.commands.demo import Demo
from pyro_gpvae.commands.evaluate import Evaluate
from pyro_gpvae.commands.guides import Guides
from pyro_gpvae.commands.train import Train

__all__ = ["Demo", "Evaluate", "Guides", "Train"]
