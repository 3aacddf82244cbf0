r"""The entry point of the command ``pyro-gpvae``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from pyro_gpvae import __version__
from pyro_gpvae.cli import commands
from pyro_gpvae.cli._shared import one_line, printable
from pyro_gpvae.cli.train import Train
from pyro_gpvae.core._allocator import keep_freed_memory
from pyro_gpvae.core._signals import Terminated, ending_on_signals

_DESCRIPTION = """Train the encoders (guides) of variational autoencoders and estimate log p(x) of
every test image. All scores are in nats per image. --version prints the version."""

_Command = (
    commands.Demo | Train | commands.Evaluate | commands.Gap | commands.Uncertainty
    | commands.Generate | commands.Report | commands.Results | commands.Guides
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, which prints its help if it has no arguments.

    Returns:
        The exit code: 0 for success, 2 for an error of the user, 130 after SIGINT (Ctrl-C), 143
        after SIGTERM, and 141 if nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may know no Greek letters
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # as after "| head"; what is left in the buffer must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"pyro-gpvae {__version__}")
        return 0
    verbose = False
    logger, log = logging.getLogger("pyro_gpvae"), logging.StreamHandler()
    try:
        with ending_on_signals(), warnings.catch_warnings():
            command: Any = tyro.cli(
                _Command,
                prog="pyro-gpvae",
                description=_DESCRIPTION,
                args=arguments or ["--help"],
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            verbose = command.verbose
            if verbose:
                warnings.simplefilter("always")
            warnings.showwarning = _Warnings(verbose)
            logger.addHandler(log)
            if not (getattr(command, "quiet", False) or sys.stderr.isatty()):
                logger.setLevel(logging.INFO)  # a line for each epoch instead of a bar
            keep_freed_memory()
            command.run()
    except KeyboardInterrupt as error:
        print(f"\npyro-gpvae: interrupted: {one_line(error)}", file=sys.stderr)
        return 130
    except Terminated as error:
        print(f"\npyro-gpvae: terminated: {one_line(error)}", file=sys.stderr)
        return 143
    except BrokenPipeError:
        raise
    except Exception as error:
        if verbose or not _is_expected(error):
            raise
        print(f"pyro-gpvae: error: {one_line(error)}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(log)
        logger.setLevel(logging.NOTSET)
    return 0


def _is_expected(error: Exception) -> bool:
    """Whether the message of an error tells the user enough, without a traceback."""
    if isinstance(error, ValueError | OSError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and "memory" in str(error):  # torch's allocators
        return True
    from torch.linalg import LinAlgError  # type: ignore[attr-defined]

    from pyro_gpvae.core._errors import NonFiniteError

    return isinstance(error, NonFiniteError | LinAlgError)


class _Warnings:
    """Prints warnings as one line, and one of each kind of our own, which differ in numbers."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.seen: set[type[Warning]] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        again = category is not UserWarning and category in self.seen
        self.seen.add(category)
        if self.verbose or not again:
            print(printable(f"pyro-gpvae: warning: {message}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
