"""The decomposition of the inference gap: exact where it is known, resumed, honestly averaged."""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import toy
from torch import nn
from torch.distributions import kl_divergence

from guides import GaussianGuide, GPGuide, SemiAmortizedGuide
from pyro_gpvae import ImageModel, RunConfig, gap, gap_report, train_run
from pyro_gpvae.cli.gap import GAP_FILES
from pyro_gpvae.cli.gap import Gap as GapCommand
from pyro_gpvae.core._files import read_json
from pyro_gpvae.evaluation.gap import decompose
from pyro_gpvae.plots.gap import gap_ladder
from pyro_gpvae.runs.gap_report import gap_markdown, measure_gaps, read_table, summarise
from pyro_gpvae.testing import linear_gaussian

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import gap_table

BUDGET = {"num_samples": 20, "reference_samples": 30}


class Known(nn.Module):
    """A guide whose posterior is given by a function of the exact one."""

    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def shifted_diagonal(model):
    """A bad diagonal Gaussian around the exact posterior."""

    def posterior(x):
        exact = model.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt().expand(len(x), -1)
        return dist.Normal(exact.mean + 0.3 * scale, 1.2 * scale).to_event(1)

    return Known(posterior)


def shifted_full(model):
    def posterior(x):
        exact = model.posterior(x)
        return dist.MultivariateNormal(exact.mean + 0.1, exact.covariance_matrix * 1.3)

    return Known(posterior)


def curved_model():
    """A decoder so curved that its posteriors are far from Gaussian."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, toy.SHAPE))
    decoder[0].weight.data *= 3
    return ImageModel(toy.SHAPE, 2, decoder, sigma=0.3).double()


@pytest.mark.parametrize("make", [shifted_diagonal, shifted_full])
def test_the_gaps_of_a_linear_gaussian_model_are_the_analytic_ones(make):
    model = linear_gaussian((1, 8, 8), latent_dim=10).double()
    x = model.images(4)
    guide = make(model)
    found = decompose(model, guide, x, num_samples=40_000, reference_samples=100)
    with torch.no_grad():
        exact = model.posterior(x)
        variance = 1 / exact.precision_matrix.diagonal(dim1=-2, dim2=-1).expand(4, -1)
        mean_field = kl_divergence(
            dist.MultivariateNormal(exact.mean, torch.diag_embed(variance)), exact
        )
        q = guide.posterior(x)
        covariance = getattr(q, "covariance_matrix", torch.diag_embed(q.variance))
        full = dist.MultivariateNormal(q.mean, covariance)
        total = kl_divergence(full, exact)
    assert float(mean_field.min()) > 0.2
    assert float(total.min()) > 0.3
    own = mean_field if make is shifted_diagonal else torch.zeros(4).double()
    assert found.family == ("diagonal" if make is shifted_diagonal else "full")
    assert bool(found.converged.all())
    for gap_, exact_gap in (
        (found.log_evidence, model.log_evidence(x)),
        (found.approximation, own),
        (found.amortisation, total - own),
        (found.log_evidence - found.elbo_full, torch.zeros(4).double()),
        (found.elbo_full - found.elbo_diagonal, mean_field),
    ):
        torch.testing.assert_close(gap_, exact_gap.detach(), rtol=0, atol=0.02)
    # a normal error: exceeded by a right estimate with probability 4 * 6e-5
    assert bool(((found.log_evidence - found.elbo - total).abs() < 4 * found.elbo_error).all())


def test_a_random_encoder_pays_for_its_spread_until_eq_2():
    model, x = toy.linear_model(), toy.images(6)
    torch.manual_seed(0)
    guide = GPGuide(model, toy.linear_encoder(), initial_scale=0.3).double()
    found = decompose(model, guide, x, num_train=50, num_samples=4000)
    with torch.no_grad():
        a, v, b, r = guide.moments(x)
        fit = toy.expected_log_likelihood(model, x, a, v + (2 * b + 2 * r).exp())
        bound = fit - guide.expected_kl(x) - guide.kl_weights() / 50
    assert float(found.spread.min()) > 0.05
    assert bool(((found.bound - bound).abs() < 4 * found.elbo_error).all())
    torch.testing.assert_close(found.kl_global, guide.kl_weights().detach().expand(6) / 50)
    table = found.table()
    rungs = table[list(gap.LADDER)].sum(axis=1)
    np.testing.assert_allclose(rungs, table["log_evidence"] - table["bound"], atol=1e-9)


def test_other_guides_pay_nothing():
    model, x = toy.linear_model(), toy.images(3)
    torch.manual_seed(0)
    found = decompose(model, GaussianGuide(model, toy.linear_encoder()).double(), x, **BUDGET)
    assert float(found.spread.abs().max()) == float(found.kl_global.abs().max()) == 0
    assert bool(found.annealed.isnan().all())
    torch.testing.assert_close(found.bound, found.elbo)


class Random(nn.Module):
    """A user's random encoder: the guide contract, and nothing else."""

    def posterior(self, x):
        return dist.Normal(x.flatten(1)[:, :2], math.hypot(1.0, 0.5)).to_event(1)

    def global_prior(self):
        return {"W": dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)}

    def forward(self, x):
        W = pyro.sample("W", dist.Normal(torch.zeros(2).double(), 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :2] + W, 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:Found vars in guide")
def test_a_random_encoder_that_does_not_tell_its_prices():
    model, x = toy.linear_model(), toy.images(3)
    found = decompose(model, Random(), x, **BUDGET)
    assert bool(found.spread.isnan().all() & found.kl_global.isnan().all())
    assert bool(found.bound.isnan().all())
    table = found.table().assign(run="run", label="mine")
    row = next(line for line in gap_markdown(table, "").splitlines() if line.startswith("| `mine`"))
    assert "| not known | not known | 3 of 3 |" in row
    # two methods more, and it does
    guide = Random()
    one = torch.ones(3, 2).double()
    guide.moments = lambda x: tuple(m[: len(x)] for m in (one, 0.25 * one, 0 * one, 0 * one))
    guide.kl_weights = lambda: torch.tensor(6.0)
    told = decompose(model, guide, x, num_train=3, **BUDGET)
    torch.testing.assert_close(told.spread, torch.full((3,), math.log(1.25)).double())
    torch.testing.assert_close(told.kl_global, torch.full((3,), 2.0).double())

    # what is scored given the weights has paid for their spread
    class Program(nn.Module):
        global_prior, moments, forward = Random.global_prior, guide.moments, Random.forward

    given = decompose(model, Program(), x, **BUDGET)
    assert float(given.spread.abs().max()) == 0
    assert bool(given.kl_global.isnan().all())


@pytest.mark.parametrize(
    ("moments", "got"),
    [
        ((1, 2), "2 parts"),
        ({"mean": 0}, "dict"),
        ((torch.zeros(1, 2),) * 3, "3 parts"),
        ((torch.zeros(1, 2), *(torch.zeros(1, 3),) * 3), r"shapes \[\(1, 2\), \(1, 3\)"),
        ((torch.zeros(2),) * 4, r"shapes \[\(2,\)"),
    ],
)
def test_moments_of_another_kind_are_named(moments, got):
    guide = GaussianGuide(toy.linear_model(), toy.linear_encoder()).double()
    guide.global_prior = lambda: {"W": dist.Normal(0.0, 1.0)}
    guide.moments = lambda x: moments
    message = rf"moments\(x\) of the guide GaussianGuide must be four tensors \(1, p\).*{got}"
    with pytest.raises(ValueError, match=message):
        decompose(toy.linear_model(), guide, toy.images(3), **BUDGET)


def test_a_model_without_parameters():
    class Fixed(nn.Module):
        def forward(self, z):
            return z.sum(-1, keepdim=True).expand(*z.shape[:-1], 6)

    decoder = nn.Sequential(Fixed(), nn.Unflatten(-1, toy.SHAPE))
    model = ImageModel(toy.SHAPE, 2, decoder, likelihood="bernoulli")
    assert not list(model.parameters())
    x = (toy.images(2) > 0.5).float()
    guide = GaussianGuide(model, nn.Flatten())
    assert bool(decompose(model, guide, x, **BUDGET).elbo.isfinite().all())


class Program(nn.Module):
    """A user's guide: no posterior, and a random weight of its own."""

    def __init__(self, q=dist.Normal):
        super().__init__()
        self.q = q

    def forward(self, x):
        shift = pyro.sample("shift", dist.Normal(0.0, 0.1), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            loc = x.flatten(1)[..., :2] + shift.unsqueeze(-1)
            pyro.sample("z", self.q(loc, 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:Found vars in guide")
def test_any_program_is_a_guide():
    model, x = toy.linear_model(), toy.images(3)
    found = decompose(model, Program(), x, num_samples=2000, num_chains=4, num_steps=10)
    assert bool(found.trusted.all())
    assert found.family == "other"
    torch.testing.assert_close(found.log_evidence, toy.exact_evidence(model, x), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.annealed, toy.exact_evidence(model, x), rtol=0, atol=0.05)
    assert bool((found.log_evidence > found.elbo).all())


def test_images_in_parts_are_images_together():
    model, x = curved_model(), toy.images(32)
    torch.manual_seed(0)
    guide = GaussianGuide(model, toy.linear_encoder()).double()
    state = torch.random.get_rng_state()
    whole = decompose(model, guide, x, **BUDGET).table()
    assert torch.equal(torch.random.get_rng_state(), state)
    parts = [
        decompose(model, guide, x[:25], **BUDGET).table(),
        decompose(model, guide, x[25:], first_image=25, **BUDGET).table(),
    ]
    together = pd.concat(parts, ignore_index=True).assign(image=range(32))
    pd.testing.assert_frame_equal(whole, together, check_exact=True)


def test_a_refined_start_is_refined_on_the_same_noise():
    model, x = curved_model(), toy.images(3)
    torch.manual_seed(0)
    guide = SemiAmortizedGuide(model, 2, toy.linear_encoder()).double()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = decompose(model, guide, x, **BUDGET).table()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    pd.testing.assert_frame_equal(first, decompose(model, guide, x, **BUDGET).table())


def test_nearby_seeds_share_no_noise():
    model, x = curved_model(), toy.images(3)
    guide = GaussianGuide(model, toy.linear_encoder()).double()
    same = x[:1].expand(2, *x.shape[1:])
    first = decompose(model, guide, same, seed=0, first_image=1, **BUDGET)
    other = decompose(model, guide, same, seed=1, first_image=0, **BUDGET)
    assert not bool((first.elbo == other.elbo).any())


def test_an_optimum_that_has_not_converged_is_flagged_and_left_out():
    model, x = curved_model(), toy.images(12)
    torch.manual_seed(0)
    guide = GaussianGuide(model, toy.linear_encoder()).double()
    found = decompose(model, guide, x, max_optimum_steps=1, **BUDGET)
    left = int((~found.converged).sum())
    assert left > 0
    assert f"{left} of them not converged" in repr(found)
    table = found.table().assign(run="run", label="vae")
    # some of each kind, whatever the model
    table["converged"] = np.arange(12) >= 3
    table["pareto_k"] = np.where(np.arange(12) == 5, 0.9, 0.2)
    table["trusted"] = np.arange(12) >= 2
    summary = summarise(table).set_index("quantity")
    assert summary.loc["amortisation", "images"] == 9
    assert summary.loc["amortisation", "images_of_all"] == 12
    assert summary.loc["amortisation", "mean"] == pytest.approx(table["amortisation"][3:].mean())
    assert summary.loc["amortisation", "mean_of_all"] == pytest.approx(table["amortisation"].mean())
    text = gap_markdown(table, "caption")
    assert "9 of 12" in text
    assert "too low: 1 images of `vae`." in text
    assert "reliable, the highest that nothing refutes is given: 2 images of `vae`." in text
    assert "3 images whose optimum has not converged are left out" in text


def two_seeds():
    """Gaps of two seeds of one guide, and one of another, on four images."""
    rows = []
    for run, label, level in (("a", "gp", 1.0), ("b", "gp", 3.0), ("c", "vae", 5.0)):
        for image in range(4):
            row = dict.fromkeys((*gap_report._QUANTITIES, *gap.LADDER), level + image) | {
                "run": run,
                "label": label,
                "image": image,
                "converged": True,
            }
            rows.append(row | {"pareto_k": 0.1, "family": "diagonal", "seed": 0, "guide": label})
    return pd.DataFrame(rows)


def test_seeds_are_averaged_and_their_spread_is_told():
    summary = summarise(two_seeds()).set_index(["label", "quantity"]).loc[("gp", "gap")]
    assert summary["mean"] == 3.5
    assert summary["sd"] == pytest.approx(math.sqrt(2))
    assert summary["seeds"] == 2
    assert "3.50 ± 1.41" in gap_markdown(two_seeds(), "")
    one = "Where there is one seed, it is the error from the images."
    assert f"± is the standard deviation over seeds. {one}" in gap_markdown(two_seeds(), "")
    both = two_seeds().query("label == 'gp'")
    assert "± is the standard deviation over seeds.\n" in gap_markdown(both, "")
    alone = two_seeds().query("label == 'vae'")
    assert "± is the error from the images.\n" in gap_markdown(alone, "")


def test_the_picture_has_a_bar_a_guide_and_names_its_units(tmp_path):
    table = two_seeds()
    table.loc[table["label"] == "vae", "encoder"] = -2.0  # better than its reference
    figure = gap_ladder(table, "K = 5")
    figure.savefig(tmp_path / "gap.png")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["gp", "vae"]
    assert "nats per image" in left.get_xlabel()
    assert "nats" in right.get_xlabel()
    widths = np.array([[bar.get_width() for bar in bars] for bars in left.containers[:5]])
    np.testing.assert_allclose(widths.sum(0), [5 * 3.5, 4 * 6.5 - 2])
    assert min(bar.get_x() + bar.get_width() for bar in left.containers[2]) == -2
    with pytest.raises(ValueError, match="at least one image"):
        gap_ladder(table.assign(converged=False))
    with pytest.raises(ValueError, match="columns"):
        gap_ladder(table.drop(columns="encoder"))


class Point(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x.flatten(1)[:, :2]).to_event(1))


def test_what_cannot_be_decomposed():
    model, x = toy.linear_model(), toy.images(3)
    vae = GaussianGuide(model, toy.linear_encoder()).double()
    with pytest.raises(ValueError, match="Point has no density: its z is a point"):
        decompose(model, Point(), x)
    with pytest.raises(ValueError, match="num_train must be the number of training images"):
        decompose(model, GPGuide(model, toy.linear_encoder()).double(), x)
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        decompose(model, vae, x, num_samples=1)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
            decompose(model, vae, x, chunk_size=size)
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\)"):
        decompose(model, vae, x[0])
    with pytest.raises(ValueError, match="needs an ImageModel, got function"):
        decompose(lambda x: None, vae, x)


TINY = {"latent_dim": 2, "epochs": 1, "train_images": 32, "num_samples": 2, "decoder": "fc"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for guide in ("vae", "gp"):
        config = RunConfig(guide=guide, test_images=7, device="cpu", **TINY)
        train_run(config, folder / guide, progress=False)
    return folder


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(gap, "BATCH", 3)
    monkeypatch.setattr(gap_report, "BATCH", 3)


def test_a_stopped_measurement_goes_on(runs, tmp_path, monkeypatch, small_batches):
    folders = [runs / "vae", runs / "gp"]
    expected, _ = measure_gaps(folders, tmp_path / "whole", progress=False, **BUDGET)
    assert expected.groupby("run").size().tolist() == [7, 7]
    assert expected["image"].tolist() == [*range(7)] * 2
    starts = []

    def stop(*args, first_image, **options):
        starts.append(first_image)
        if len(starts) == 3:
            raise KeyboardInterrupt
        return decompose(*args, first_image=first_image, **options)

    monkeypatch.setattr(gap_report, "decompose", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_gaps(folders, tmp_path / "out", progress=False, **BUDGET)
    found, _ = measure_gaps(folders, tmp_path / "out", progress=False, **BUDGET)
    assert starts == [0, 3, 6, 6, 0, 3, 6], "what was finished is not repeated"
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    measure_gaps(folders[:1], tmp_path / "out", num_images=6, progress=False, **BUDGET)
    assert len(starts) == 7, "nor what other runs and fewer images need"
    measure_gaps(folders[:1], tmp_path / "out", num_images=3, progress=False, seed=1, **BUDGET)
    assert len(starts) == 8, "another budget is another measurement"


def test_the_command_writes_tables_and_a_picture(runs, tmp_path, capsys):
    command = GapCommand(
        runs=(runs / "vae", runs / "gp"), images=4, ais_chains=2, ais_steps=3, out=tmp_path,
        num_samples=20, reference_samples=30, quiet=True,
    )  # fmt: skip
    command.run()
    printed = capsys.readouterr().out
    record, table = read_json(tmp_path / "gap.json"), read_table(tmp_path / "gap.csv")
    assert record["budget"]["num_chains"] == 2
    assert [run["config"]["guide"] for run in record["runs"]] == ["vae", "gp"]
    assert {"versions", "commit", "device"} <= set(record)
    assert len(table) == 8
    assert bool(table[["annealed", "refined", "elbo"]].notna().all(axis=None))
    assert (tmp_path / "gap.md").read_text() in printed
    assert "32 training and 4 test images" in printed
    assert "| `gp` |" in printed
    assert (tmp_path / "gap.png").stat().st_size > 10_000


def test_the_command_replaces_an_earlier_measurement_only_when_told(runs, tmp_path, monkeypatch):
    def command(**options):
        GapCommand(
            runs=(runs / "vae",), ais_chains=0, out=tmp_path, quiet=True, **BUDGET, **options
        ).run()

    measured = []

    def counted(model, guide, x, **options):
        measured.append(len(x))
        return decompose(model, guide, x, **options)

    monkeypatch.setattr(gap_report, "decompose", counted)
    measure_gaps(
        [runs / "vae"], tmp_path, num_images=4, num_chains=0, num_steps=30, seed=0,
        progress=False, **BUDGET,
    )  # fmt: skip
    (tmp_path / "thesis.tex").write_text("mine")
    command(images=4)
    assert measured == [4], "an unfinished measurement goes on"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in before} > {*GAP_FILES, "thesis.tex"}
    with pytest.raises(FileExistsError, match=r"gap\.csv is of an earlier .*\(--overwrite\)"):
        command(images=5)
    assert measured == [4], "the refusal comes before the work"
    assert before == {path: path.read_bytes() for path in before}
    command(images=4, overwrite=True)
    assert measured == [4], "nor is anything measured again"
    command(images=5, overwrite=True)
    assert len(read_table(tmp_path / "gap.csv")) == 5
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    for name in GAP_FILES:
        (tmp_path / name).unlink()
    (tmp_path / "gap.png").touch()
    with pytest.raises(FileExistsError, match=r"gap\.png"):
        command(images=5)


def test_bad_runs(runs, tmp_path):
    with pytest.raises(ValueError, match="different run folders"):
        measure_gaps([runs / "vae", runs / "vae"], tmp_path)
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        measure_gaps([runs / "vae"], tmp_path, num_images=0)
    with pytest.raises(FileNotFoundError, match="absent"):
        measure_gaps([runs / "absent"], tmp_path)


def test_a_damaged_chunk_is_measured_again(runs, tmp_path):
    def measure():
        return measure_gaps([runs / "vae"], tmp_path, num_images=4, progress=False, **BUDGET)[0]

    expected = measure()
    (chunk,) = (tmp_path / "chunks").iterdir()
    whole = chunk.read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged in (
        b"".join(lines[:-1]),  # a row is lost
        whole[:-20],  # cut in mid-line
        b"".join(lines[:2]),  # header only
        b"",
        b"".join(lines[1:]),  # no checksum
        whole.replace(b"True", b"nope"),
        b"\xff" + whole,
    ):
        chunk.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{chunk.name} is damaged.*again") as caught:
            found = measure()
        assert len(caught) == 1
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        assert chunk.read_bytes() == whole


def test_a_guide_of_the_users_own_is_read_if_trusted(runs, tmp_path, monkeypatch):
    seen = []

    def load(folder, **options):
        seen.append(options["trust_guide"])
        raise ValueError("stop")

    monkeypatch.setattr(gap_report, "load_run", load)
    for trust in (False, True):
        with pytest.raises(ValueError, match="stop"):
            GapCommand(runs=(runs / "vae",), out=tmp_path, trust_guide=trust).run()
    assert seen == [False, True]


def test_a_run_without_weights(runs, tmp_path):
    (tmp_path / "run").mkdir()
    for file in (runs / "vae").iterdir():
        if file.is_file() and file.name != "weights.safetensors":
            (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    with pytest.raises((FileNotFoundError, ValueError), match=r"weights\.safetensors"):
        measure_gaps([tmp_path / "run"], tmp_path / "out", progress=False)


def test_the_experiment(tmp_path, capsys, monkeypatch):
    options = gap_table.Options(
        guides=("vae", "gp"), seeds=2, epochs=1, latent_dim=2, train_images=32, images=9,
        num_samples=20, reference_samples=30, ais_chains=0, device="cpu",
        runs=tmp_path / "runs", docs=tmp_path / "docs",
    )  # fmt: skip
    gap_table.main(options)
    printed = capsys.readouterr().out
    assert "to train 4 of 4 runs" in printed
    results = tmp_path / "docs" / "results"
    text = (results / "gap.md").read_text()
    assert text in printed
    assert "seed 0 / 1" in text
    assert "`gp`, seed 1:" in text
    assert str(tmp_path) not in text + (results / "gap.json").read_text()
    assert str(tmp_path) not in (results / "gap.csv").read_text()
    assert (tmp_path / "docs" / "images" / "gap.png").exists()
    # again: nothing is trained or measured, the same table comes out
    monkeypatch.setattr(gap_table, "complete_run", None)
    monkeypatch.setattr(gap_report, "decompose", None)
    gap_table.main(options)
    assert "to train 0 of 4 runs" in capsys.readouterr().out
    assert (results / "gap.md").read_text() == text
    options.epochs = 2
    with pytest.raises(ValueError, match="epochs = 1, not 2"):
        gap_table.main(options)
