r"""The entry point of the command ``pyro-gpvae``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from pyro_gpvae import __version__
from pyro_gpvae.cli._shared import one_line
from pyro_gpvae.cli.demo import Demo
from pyro_gpvae.cli.evaluate import Evaluate
from pyro_gpvae.cli.gap import Gap
from pyro_gpvae.cli.generate import Generate
from pyro_gpvae.cli.guides import Guides
from pyro_gpvae.cli.results import Results
from pyro_gpvae.cli.train import Train
from pyro_gpvae.cli.uncertainty import Uncertainty
from pyro_gpvae.core._allocator import keep_freed_memory
from pyro_gpvae.core._signals import Terminated, ending_on_signals

__all__ = ["main"]

_DESCRIPTION = """Train the encoders (guides) of variational autoencoders and estimate log p(x) of
every test image. All scores are in nats per image. --version prints the version."""

#: If this environment variable is set, errors come with their traceback.
_TRACEBACK = "PYRO_GPVAE_TRACEBACK"

_Command = Demo | Train | Evaluate | Gap | Uncertainty | Generate | Results | Guides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, which prints its help if it has no arguments.

    Returns:
        The exit code: 0 for success, 2 for an error of the user, 130 after SIGINT (Ctrl-C), and
        143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"pyro-gpvae {__version__}")
        return 0
    if not sys.stderr.isatty():  # a log file gets a line a minute of each progress bar
        os.environ.setdefault("TQDM_MININTERVAL", "60")
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")
    try:
        with ending_on_signals(), warnings.catch_warnings():
            command: Any = tyro.cli(
                _Command,
                prog="pyro-gpvae",
                description=_DESCRIPTION,
                args=arguments or ["--help"],
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            warnings.showwarning = _show_warning
            keep_freed_memory()
            command.run()
    except KeyboardInterrupt as error:
        print(f"\npyro-gpvae: interrupted: {one_line(error)}", file=sys.stderr)
        return 130
    except Terminated as error:
        print(f"\npyro-gpvae: terminated: {one_line(error)}", file=sys.stderr)
        return 143
    except Exception as error:
        if os.environ.get(_TRACEBACK) or not _is_expected(error):
            raise
        print(f"pyro-gpvae: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _is_expected(error: Exception) -> bool:
    """Whether the message of an error tells the user enough, without a traceback."""
    if isinstance(error, ValueError | OSError):
        return True
    from torch.linalg import LinAlgError  # type: ignore[attr-defined]

    from pyro_gpvae.core._errors import NonFiniteError

    return isinstance(error, NonFiniteError | LinAlgError)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pyro-gpvae: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
