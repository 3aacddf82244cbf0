r"""The command ``pyro-gpvae``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.cli._commands import (
    Demo,
    Evaluate,
    Gap,
    Generate,
    Guides,
    Results,
    Train,
    Uncertainty,
)
from pyro_gpvae.cli._text import one_line
from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._signals import Terminated, terminating
from pyro_gpvae.training.checkpoint import NewerFormatError

__all__ = ["main"]

_DESCRIPTION = """How well does a variational autoencoder infer? Train encoders (guides), measure
log p(x) of every test image. All scores are in nats per image."""

#: If this environment variable is set, errors come with their traceback.
_TRACEBACK = "PYRO_GPVAE_TRACEBACK"


_Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Gap, tyro.conf.subcommand("gap")]
    | Annotated[Uncertainty, tyro.conf.subcommand("uncertainty")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Results, tyro.conf.subcommand("results")]
    | Annotated[Guides, tyro.conf.subcommand("guides")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Arguments:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0; 2 for a user's error; 130 after Ctrl-C; 143 after SIGTERM.
    """
    # a guide named MODULE:CLASS lives where the user works; last, so that it hides no package
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    command: Any = tyro.cli(
        _Command,
        prog="pyro-gpvae",
        description=_DESCRIPTION,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        with warnings.catch_warnings(), terminating():
            warnings.showwarning = _show_warning
            command.run()
    except (ValueError, OSError, NonFiniteError, NewerFormatError, LinAlgError) as error:
        if os.environ.get(_TRACEBACK):
            raise
        print(f"pyro-gpvae: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\npyro-gpvae: interrupted: {one_line(error)}", file=sys.stderr)
        return 130
    except Terminated as error:
        print(f"\npyro-gpvae: terminated: {one_line(error)}", file=sys.stderr)
        return 143
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pyro-gpvae: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
