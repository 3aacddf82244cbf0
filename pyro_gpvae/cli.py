r"""The command ``pyro-gpvae``: demo, train, evaluate, guides."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_gpvae.config import RunConfig
from pyro_gpvae.guide import available_guides
from pyro_gpvae.runs import evaluate_run, train_run
from pyro_gpvae.training import NonFiniteError

__all__ = ["Demo", "Evaluate", "Guides", "Train", "main"]

_DESCRIPTION = """How well does a variational autoencoder infer? Train encoders (guides), measure
log p(x) of every test image. All scores are in nats per image."""

#: If this environment variable is set, errors come with their traceback.
_TRACEBACK = "PYRO_GPVAE_TRACEBACK"


@dataclass(kw_only=True)
class Demo:
    """Train VAE and GPVAE on 5,000 digits and write a report; under 3 minutes on 2 CPU cores.

    Attributes:
        out: Folder of the report; an earlier report in it is replaced.
        quick: Cut the budget to under 30 seconds; every caption says so.
        seed: Seed of the whole demo.
        device: "cpu", "cuda" or "cuda:INDEX"; None is CUDA if there is one, else the CPU.
        quiet: Show no progress bars.
    """

    out: Path = Path("demo")
    quick: bool = False
    seed: int = 0
    device: str | None = None
    quiet: bool = False

    def run(self) -> None:
        from pyro_gpvae.demo import run_demo  # matplotlib takes half a second to import

        run_demo(
            self.out, quick=self.quick, seed=self.seed, device=self.device, progress=not self.quiet
        )


@dataclass(kw_only=True)
class Train(RunConfig):
    """Train a guide and a model, evaluate them on the test images, write a run folder.

    Attributes:
        out: The run folder: it appears when the run is finished.
        overwrite: Replace an earlier run in that folder.
        quiet: Show no progress bar.
    """

    out: Path = Path("run")
    overwrite: bool = False
    quiet: bool = False

    def run(self) -> None:
        options = {field.name: getattr(self, field.name) for field in fields(RunConfig)}
        record = train_run(
            RunConfig(**options), self.out, overwrite=self.overwrite, progress=not self.quiet
        )
        _print_scores(record)
        print(f"written to {self.out}")


@dataclass(kw_only=True)
class Evaluate:
    """Evaluate a run folder again; without options, exactly its recorded score.

    Attributes:
        run_folder: The run folder.
        guide: Another guide over the run's decoder, such as "vae" or "my_guides:MyGuide"; it
            starts from the run's encoder where it can, and is not trained. None is the run's.
        num_samples: Importance samples K per image; None is as recorded.
        seed: Seed of the samples; None is as recorded.
        test_images: Only the first so many of the run's test images; None is all.
        chunk_size: Latent vectors decoded at once: bounds the memory; None is as recorded.
        data: Name or .npz path of the run's data, if they have moved.
        root: Folder of data sets, if it has moved.
        device: "cpu", "cuda" or "cuda:INDEX"; None is the run's.
        out: Folder for record.json and for scores.csv with a row for each image; None is none.
        overwrite: Replace an earlier evaluation in that folder.
    """

    run_folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    guide: str | None = None
    num_samples: int | None = None
    seed: int | None = None
    test_images: int | None = None
    chunk_size: int | None = None
    data: str | None = None
    root: str | None = None
    device: str | None = None
    out: Path | None = None
    overwrite: bool = False

    def run(self) -> None:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        result = evaluate_run(options.pop("run_folder"), **options)
        _print_scores(result)
        recorded = result["recorded"]
        if self.guide is not None:
            print(f"recorded log p(x)  {recorded['log_evidence']:.4f}  (the run's own guide)")
            return
        same = recorded["log_evidence"] == result["scores"]["log_evidence"]
        print(
            f"recorded log p(x)  {recorded['log_evidence']:.4f}  ({'equal' if same else 'differs'})"
        )


@dataclass
class Guides:
    """List the registered guides."""

    def run(self) -> None:
        for name, point in available_guides().items():
            try:
                lines = (point.load().__doc__ or "").strip().splitlines()
                print(f"{name:<12} {lines[0] if lines else '(not documented)'}")
            except Exception as error:  # another package's mistake must not hide the rest
                print(f"{name:<12} cannot be loaded from {point.value}: {_one_line(error)}")
        print("A guide of your own: --guide MODULE:CLASS, found in the current directory.")


_Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Guides, tyro.conf.subcommand("guides")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C.

    Arguments:
        argv: The arguments; by default those of the process.
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
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command.run()
    except (ValueError, OSError, NonFiniteError, LinAlgError) as error:
        if os.environ.get(_TRACEBACK):
            raise
        print(f"pyro-gpvae: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npyro-gpvae: interrupted, nothing half-written", file=sys.stderr)
        return 130
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pyro-gpvae: warning: {message}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print_scores(record: dict[str, Any]) -> None:
    """The scores of a record, a line each."""
    scores = record["scores"]
    error = scores["monte_carlo_error"]
    spread = scores["sampling_error"]
    print(f"{record['config']['guide']}: {scores['num_images']} test images, nats per image")
    print(
        f"log p(x)           {scores['log_evidence']:.4f}  (K = {scores['num_samples']}"
        + (f"; Monte-Carlo error {error:.3f}" if error == error else "")
        + (f"; error from the choice of images {spread:.2f})" if spread is not None else ")")
    )
    print(f"median log p(x)    {scores['median_log_evidence']:.4f}")
    print(f"ELBO               {scores['elbo']:.4f}")
    print(
        f"effective samples  {scores['mean_effective_sample_size']:.1f} of {scores['num_samples']}"
    )
    for name, value in record["diagnostics"].items():
        print(f"{name:<18} {value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
