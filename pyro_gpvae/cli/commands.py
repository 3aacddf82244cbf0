r"""The subcommands of ``pyro-gpvae`` apart from ``train``, in alphabetical order."""

from __future__ import annotations

import ast
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tyro

from pyro_gpvae.cli._shared import (
    Command,
    Quiet,
    RunFolder,
    RunFolders,
    Where,
    keywords,
    print_scores,
    printable,
)
from pyro_gpvae.core._registry import distribution_name, registered_guides


@dataclass(kw_only=True)
class Demo(Command):
    """Train VAE, GPVAE and newton on 5,000 digits, and report what inference loses: 3 minutes.

    Attributes:
        out: Folder of the report; an earlier report in it is replaced.
        quick: Cut the budget to under 30 seconds; every caption says so.
        seed: Seed of the whole demo.
        device: "cpu", "cuda" or "cuda:INDEX"; None is CUDA if it is available, else the CPU.
        quiet: Show no progress on standard error.
    """

    out: Path = Path("demo")
    quick: bool = False
    seed: int = 0
    device: str | None = None
    quiet: Quiet = False

    def run(self) -> None:
        from pyro_gpvae.runs.demo import run_demo

        begin = time.monotonic()
        run_demo(**keywords(self) | {"progress": not self.quiet}).print()
        print(f"\n{time.monotonic() - begin:.0f} seconds; the report is {self.out / 'report.html'}")


@dataclass(kw_only=True)
class Evaluate(Where):
    """Evaluate a run folder again; without options, the score is exactly the recorded one.

    Attributes:
        run_folder: The run folder.
        guide: Another guide for the run's decoder, such as "vae" or "my_guides:MyGuide"; it
            starts from the run's encoder where it can, and is not trained. None is the run's.
        num_samples: Importance samples K per image; None is as recorded.
        seed: Seed of the samples; None is as recorded.
        test_images: The number of the run's test images, from the first on; None is all.
        chunk_size: Latent vectors decoded at once, which bounds the memory; None is as recorded.
        reference: For the first so many test images, also IWAE with a wider q and with each
            image's optimum as the proposal, and annealed importance sampling. They tell a better
            model from a better proposal. Takes seconds per image at worst.
        out: Folder for record.json and for scores.csv with one row per image; None writes none.
        overwrite: Replace an earlier evaluation in that folder.
        quiet: Show no progress on standard error.
    """

    run_folder: RunFolder
    guide: str | None = None
    num_samples: int | None = None
    seed: int | None = None
    test_images: int | None = None
    chunk_size: int | None = None
    reference: int | None = None
    out: Path | None = None
    overwrite: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        from pyro_gpvae.runs.evaluate import evaluate_run

        options = keywords(self)
        result = evaluate_run(options.pop("run_folder"), **options)
        print_scores(result)
        if "reference" in result:
            _print_reference(result["reference"])
        recorded, found = result["recorded"]["log_evidence"], result["scores"]["log_evidence"]
        note = "equal" if recorded == found else "differs"
        note = note if self.guide is None else "the run's own guide"
        print(f"recorded log p(x)  {recorded:.4f}  ({note})")


def _print_reference(reference: dict[str, Any]) -> None:
    """Prints one line per estimator."""
    print(f"of the first {reference['num_images']} test images:")
    for name, found in reference["estimates"].items():
        notes = [f"Monte-Carlo error {found['monte_carlo_error']:.3f}"]
        if name.endswith("width c"):
            notes.append(f"mean c = {reference['mean_width']:.2f}")
        print(f"{name:<25} {found['log_evidence']:.4f}  ({'; '.join(notes)})")
    left = reference["not_trusted"]
    note = f"  ({left} images without a reliable estimate)" if left else ""
    print(f"{'most reliable':<25} {reference['log_evidence']:.4f}{note}")


@dataclass(kw_only=True)
class Gap(Where):
    """Decompose the inference gap of runs; tell a better model from a better proposal.

    Finished images are kept in OUT/chunks: the same command continues.

    Attributes:
        runs: Run folders; with --trust-guide also MODULE:FUNCTION, which returns a model
            and its guide.
        images: The number of test images of each run, from the first on.
        num_samples: Samples K per image for each ELBO.
        reference_samples: Samples K per image from the best full Gaussian, for log p(x).
        ais_chains: Chains per image of annealed importance sampling; 0 turns it off.
        ais_steps: Steps of annealed importance sampling, from the best full Gaussian.
        seed: Seed of the samples.
        out: Folder for gap.csv (one row per run and image), gap.json, gap.md, gap.png and
            report.html.
        overwrite: Replace the files of a finished measurement; no image is measured again.
        quiet: Show no progress on standard error.
    """

    runs: RunFolders
    images: int = 100
    num_samples: int = 500
    reference_samples: int = 1000
    ais_chains: int = 8
    ais_steps: int = 30
    seed: int = 0
    out: Path = Path("gap")
    overwrite: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        if not self.runs:
            raise ValueError("expected one or more run folders")
        from pyro_gpvae.runs.gap_report import report_gaps

        options = keywords(self)
        options["num_images"] = options.pop("images")
        budget = {name: options.pop(name) for name in ("num_samples", "reference_samples", "seed")}
        budget["num_chains"] = options.pop("ais_chains")
        budget["num_steps"] = options.pop("ais_steps")
        report_gaps(options.pop("runs"), options.pop("out"), budget, **options).print()
        print(f"written to {self.out}")


@dataclass(kw_only=True)
class Generate(Where):
    """Draw samples and reconstructions, and map the latent space of a run.

    Attributes:
        run_folder: The run folder; with --trust-guide also MODULE:FUNCTION, which returns a
            model and its guide.
        out: Folder for samples.png, reconstructions.png, latent.png, generated.json and
            report.html.
        samples: Number of samples from the prior.
        images: Indices of the test images to reconstruct, in order. None is the first 8.
        seed: Seed of all draws; None is that of the run.
        overwrite: Replace what this command wrote to that folder before.
    """

    run_folder: RunFolder
    out: Path = Path("generated")
    samples: int = 64
    images: tuple[int, ...] | None = None
    seed: int | None = None
    overwrite: bool = False

    def run(self) -> None:
        from pyro_gpvae.runs.generation_report import report_generation

        report_generation(**keywords(self)).print()
        print(f"written to {self.out}")


@dataclass(kw_only=True)
class Guides(Command):
    """List the registered guides."""

    def run(self) -> None:
        for name, points in registered_guides().items():
            for point in points:
                if len(points) > 1:
                    text = f"registered several times, here by {distribution_name(point)}"
                else:
                    text = _summary(*point.value.split(":", 1)) or f"({point.value})"
                print(f"{name:<12} {text}")
        print("Your own guide: --guide MODULE:CLASS, from the working directory or installed.")


def _summary(module: str, name: str = "") -> str:
    """Returns the first line of a class's docstring, from its source: nothing is imported.

    A name that ``module`` imports from another module is followed there. Returns "" if there is
    no docstring or no source.
    """
    try:
        first, *rest = module.split(".")
        spec = find_spec(first)  # of a top-level module, which does not import it
        if spec is None or spec.origin is None:
            return ""
        path = Path(spec.origin)
        if rest:
            path = path.parent.joinpath(*rest)
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return (ast.get_docstring(node) or "").partition("\n")[0]
            if isinstance(node, ast.ImportFrom) and node.module and node.module != module:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _summary(node.module, alias.name)
    except (ImportError, OSError, SyntaxError, ValueError, RecursionError):
        pass  # another package's mistake must not hide the rest of the list
    return ""


@dataclass(kw_only=True)
class Report(Where):
    """Compare runs in one HTML file: scores, curves, gaps, hard images and samples.

    Attributes:
        runs: Run folders; with --trust-guide also MODULE:FUNCTION, which returns a model
            and its guide.
        out: The HTML file, which needs no other file.
        images: The inference gap is measured on the first so many test images; 0 omits it.
        overwrite: Replace the file.
        quiet: Show no progress on standard error.
    """

    runs: RunFolders
    out: Path = Path("report.html")
    images: int = 20
    overwrite: bool = False
    quiet: Quiet = False

    def run(self) -> None:
        if not self.runs:
            raise ValueError("expected one or more run folders")
        from pyro_gpvae.runs.run_report import report_runs

        options = keywords(self)
        report_runs(options.pop("runs"), options.pop("out"), **options)
        print(f"written to {self.out}")


@dataclass(kw_only=True)
class Results(Command):
    """List the runs in a folder, and say what makes their scores incomparable.

    Attributes:
        folder: The folder; its runs may lie in subfolders.
        csv: Write all columns to this file.
        seeds: Print means and standard deviations over seeds instead.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    csv: Path | None = None
    seeds: bool = False

    def run(self) -> None:
        from pyro_gpvae.core._files import write_text
        from pyro_gpvae.runs import results

        frame, skipped = results.read_results(self.folder)
        for line in skipped if self.verbose else ():
            print(printable(f"skipped: {line}"), file=sys.stderr)
        if self.csv is not None:
            write_text(self.csv, frame.to_csv(index=False))
        names = ["data", "latent_dim", "decoder", "seed", "epochs"]
        common = [name for name in names if len(frame) > 1 and frame[name].nunique() == 1]
        names = [name for name in names if name not in common]
        table = frame[["run", "method", *names, "log_evidence", "elbo"]]
        if self.seeds:
            table, common = results.over_seeds(frame), []
            table = table.drop(columns=["guide", "warm_start"], errors="ignore")  # in the method
        if not frame.empty:
            print(printable(table.to_string(index=False, float_format="{:.2f}".format)))
        if common:
            same = ", ".join(f"{name} {frame[name].iloc[0]}" for name in common)
            print(printable(f"all runs: {same}"))
        print(f"{len(frame)} runs, {len(skipped)} other records; scores in nats per image")
        for line in results.differences(frame):
            print(printable(f"differs: {line}"))


@dataclass(kw_only=True)
class Uncertainty(Where):
    """Correlate the uncertainty of a random encoder with the inference gap of each image.

    Finished images are kept in OUT/chunks: the same command continues.

    Attributes:
        run_folder: The folder of a run whose guide is a random encoder, such as "gp".
        images: The number of test images, from the first on.
        num_samples: Samples K per image for each ELBO.
        reference_samples: Samples K per image from the best full Gaussian, for log p(x).
        bootstrap: Resamples of the images for the intervals.
        seed: Seed of samples and resamples.
        out: Folder for uncertainty.csv (one row per image), uncertainty.json, the pictures
            and report.html.
        quiet: Show no progress on standard error.
    """

    run_folder: RunFolder
    images: int = 200
    num_samples: int = 500
    reference_samples: int = 1000
    bootstrap: int = 2000
    seed: int = 0
    out: Path = Path("uncertainty")
    quiet: Quiet = False

    def run(self) -> None:
        from pyro_gpvae.runs.uncertainty_report import report_uncertainty

        report_uncertainty(**keywords(self)).print()
        print(f"written to {self.out}")
