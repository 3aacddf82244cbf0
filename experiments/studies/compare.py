"""Every guide on the same images: how much of the amortisation gap it closes, and at what cost.

    python experiments/studies/compare.py --data mnist5k --epochs 20

For each seed this trains a VAE and then every family twice: end to end from scratch, and on the
decoder of the VAE, which is kept fixed. Families that need no training (SA, VLAE) are put on that
decoder without training. The reference for every decoder is the optimal full Gaussian of each
image:

    gap(q) = ELBO[optimum] - ELBO[q],    share closed = 1 - gap(q) / gap(VAE's encoder)

0 is the VAE's encoder, 1 the optimum on the same decoder. Finished runs are not repeated. Writes
runs, ``compare.json``, ``.md``, ``.csv`` and ``.png`` to --out; ``--render`` makes the last three
again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from _gap_against_time import gap_against_time
from _study import RunOptions

from pyro_gpvae.core._files import read_json, write_json, write_text
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.runs.config import RunConfig, check_same
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.folder import Run, load_run, warm_guide
from pyro_gpvae.runs.train import train_run

#: Trained end to end, and again over the VAE's decoder.
AMORTISED = (
    "vae", "gp", "full", "lowrank:4", "iaf:2", "hf:4", "me:2", "rme:2", "iterative:2",
    "iterative:3", "iterative:4,num_samples=1",
)  # fmt: skip
#: Trained end to end, and put on the VAE's decoder without training.
REFINING = ("sa:1", "vlae:1")
#: Only put on the VAE's decoder, because training costs too much on a CPU.
REFINING_ONLY = ("sa:2", "sa:4", "sa:8", "vlae:0", "vlae:2", "vlae:4")
BATCH = 128


@dataclass(kw_only=True)
class Options(RunOptions):
    """Options of the comparison.

    Attributes:
        test_images: Evaluate the first so many test images.
        num_samples: Importance samples K per image.
        out: Folder of runs and results.
    """

    test_images: int = 200
    num_samples: int = 100
    out: Path = Path("runs/compare")


def main(options: Options) -> None:
    if not options.render:
        write_json(options.out / "compare.json", collect(options))
    record = read_json(options.out / "compare.json")
    table = summarise(record)
    write_text(options.out / "compare.csv", table.to_csv(index=False))
    write_text(options.out / "compare.md", markdown(table, caption(record)))
    gap_against_time(table, caption(record)).savefig(options.out / "compare.png", dpi=150)
    print(markdown(table, caption(record)))


def collect(options: Options) -> dict[str, Any]:
    """Trains and evaluates what is missing, and returns a row for each seed, guide and decoder."""
    rows: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    names = ("data", "root", "epochs", "latent_dim", "train_images", "test_images", "num_samples")
    shared = RunConfig(device=options.device, **{name: getattr(options, name) for name in names})
    for seed in range(options.seeds):
        config = replace(shared, seed=seed)
        folder = options.out / f"seed-{seed}"
        vae = _train(replace(config, guide="vae"), folder / "vae")
        fixed = replace(config, warm_start=str(vae.folder), freeze_decoder=True)
        candidates: list[tuple[str, str, Run, str | None]] = []
        for guide in (*AMORTISED, *REFINING, *REFINING_ONLY):
            if options.guides and guide not in ("vae", *options.guides):
                continue
            name = guide.replace(":", "-")
            if guide not in REFINING_ONLY:
                run = _train(replace(config, guide=guide), folder / name)
                candidates.append((guide, "end to end", run, None))
            if guide in AMORTISED:
                run = _train(replace(fixed, guide=guide), folder / f"{name}-fixed")
                candidates.append((guide, "VAE's decoder", run, None))
            else:
                candidates.append((guide, "VAE's decoder", vae, guide))
        times = _times([_posterior(run, guide) for _, _, run, guide in candidates], vae)
        for (guide, decoder, run, other), row in zip(candidates, times, strict=True):
            scores = run.record["scores"]
            if other is not None:
                print(f"{guide} over the decoder of {run.folder}", flush=True)
                scores = evaluate_run(run.folder, other)["scores"]
            row |= {"seed": seed, "guide": guide, "decoder": decoder}
            row |= {name: scores[name] for name in ("elbo", "log_evidence", "monte_carlo_error")}
            row["optimum"] = _optimum(vae if decoder == "VAE's decoder" else run)
            row["training_seconds"] = 0.0 if other else run.record["seconds"]["training"]
            rows.append(row)
        environment = {
            name: vae.record[name] for name in ("versions", "commit", "device", "threads", "data")
        }
    return {
        "options": {k: v for k, v in vars(options).items() if k not in ("out", "render", "root")},
        **environment,
        "rows": rows,
    }


def _train(config: RunConfig, folder: Path) -> Run:
    if not (folder / "record.json").exists():
        print(f"training {folder}", flush=True)
        train_run(config, folder, resume=True)
    run = load_run(folder)
    irrelevant = ("device", "chunk_size", "root", "warm_start")
    check_same(run.config, config, irrelevant, folder)
    return run


def _optimum(run: Run) -> float:
    """Returns the mean ELBO of the optimal Gaussians on a run's decoder, computed once."""
    folder = run.folder.with_name(f"{run.folder.name}-optimum")
    if not (folder / "record.json").exists():
        print(f"instance-wise optimum on the decoder of {run.folder}", flush=True)
        evaluate_run(run.folder, "instance:full", out=folder)
    return float(read_json(folder / "record.json")["scores"]["elbo"])


def _posterior(run: Run, other: str | None) -> Callable[[], Any]:
    """Returns a program that computes the posterior of test images and draws from it once."""
    guide = run.guide if other is None else warm_guide(other, run.model, run.guide)
    device = next(run.model.parameters()).device
    guide.to(device).eval()
    x = to_batch(run.data.test[:BATCH], run.model)[0]
    return lambda: guide.posterior(x).sample()


def _times(programs: list[Callable[[], Any]], vae: Run, repeats: int = 15) -> list[dict[str, Any]]:
    """Returns medians and quartiles of milliseconds, and ratios to a decoder pass."""
    device = next(vae.model.parameters()).device
    z = torch.zeros(BATCH, vae.model.latent_dim, device=device)
    everything = [*programs, lambda: vae.model.decoder(z)]
    with torch.no_grad():
        rounds = [[_milliseconds(p, device) for p in everything] for _ in range(repeats + 2)]
    samples = np.array(rounds[2:])  # the first two are a warm-up
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75], axis=0)
    table = {"ms": median, "ms_low": low, "ms_high": high, "decoder_passes": median / median[-1]}
    return pd.DataFrame(table)[:-1].to_dict("records")


def _milliseconds(program: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    program()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def summarise(record: dict[str, Any]) -> pd.DataFrame:
    """Returns a row for each guide and decoder: means over seeds, and the share closed."""
    rows = pd.DataFrame(record["rows"])
    rows["gap"] = rows["optimum"] - rows["elbo"]
    reference = rows[(rows["guide"] == "vae") & (rows["decoder"] == "end to end")]
    rows = rows.merge(reference[["seed", "gap"]], on="seed", suffixes=("", "_vae"))
    rows["share"] = 1 - rows["gap"] / rows["gap_vae"]
    groups = rows.groupby(["guide", "decoder"], sort=False)
    names = ["elbo", "log_evidence", "optimum", "share", "ms", "ms_low", "ms_high"]
    table = groups[[*names, "decoder_passes", "training_seconds"]].mean()
    table["share_sd"] = groups["share"].std()
    table["seeds"] = groups.size()
    return table.reset_index()


def caption(record: dict[str, Any]) -> str:
    options, data = record["options"], record["data"]

    def count(number: int, thing: str) -> str:
        return f"{number:,} {thing}{'s' if number != 1 else ''}"

    return (
        f"{options['data']}: {data['train_images']:,} training and {data['test_images']:,} test "
        f"images, p = {options['latent_dim']}, networks of the paper's tables, "
        f"{options['epochs']} epochs (the paper: 2000), K = {options['num_samples']}, "
        f"{count(options['seeds'], 'seed')}. On the VAE's decoder SA and VLAE are not trained, the "
        f"others for as many epochs again. Times: medians and quartiles of inference for {BATCH} "
        f"images, {record['device']}, {count(record['threads'], 'thread')}."
    )


def markdown(table: pd.DataFrame, caption: str) -> str:
    """Makes the page: a line for each guide with both decoders, and its cost on the VAE's."""
    lines = [
        "| guide | end to end: ELBO | IWAE | optimum | gap closed "
        "| VAE's decoder: ELBO | IWAE | gap closed | decoder passes |",
        "|---|" + "--:|" * 8,
    ]
    for guide, rows in table.groupby("guide", sort=False):
        cells = {"end to end": ["–"] * 4, "VAE's decoder": ["–"] * 3}
        for row in rows.itertuples():
            spread = "" if row.seeds == 1 else f" ± {100 * row.share_sd:.0f}"
            optimum = [f"{row.optimum:.1f}"] if row.decoder == "end to end" else []
            scores = [f"{row.elbo:.1f}", f"{row.log_evidence:.1f}", *optimum]
            cells[str(row.decoder)] = [*scores, f"{100 * row.share:.0f}{spread} %"]
        texts = [f"`{guide}`", *itertools.chain(*cells.values())]
        lines.append("| " + " | ".join([*texts, f"{rows['decoder_passes'].iloc[-1]:.1f}"]) + " |")
    reference = table.loc[table["decoder"] == "VAE's decoder", "optimum"]
    if len(reference):
        caption += (
            f" The optimum on the VAE's decoder has ELBO {reference.iloc[0]:.1f}. Decoder passes: "
            f"that time in units of the time to decode {BATCH} latent vectors."
        )
    return "\n".join([*lines, "", caption, ""])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
