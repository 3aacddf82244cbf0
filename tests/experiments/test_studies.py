"""The studies run with tiny settings, and their arithmetic is right."""

import shutil
from pathlib import Path

import ais_cost
import alternating
import gradient_variance
import newton
import newton_limits
import pytest

from pyro_gpvae import load_data
from pyro_gpvae.core._files import read_json

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def few_digits(monkeypatch):
    few = load_data("mnist5k").take(train=96, test=8)
    for module in (gradient_variance, newton):
        monkeypatch.setattr(module, "load_data", lambda *_: few)


@pytest.mark.usefixtures("few_digits")
def test_gradient_variance(tmp_path):
    options = gradient_variance.Options(epochs=1, draws=3, latent_dim=2, batch=8, out=tmp_path)
    gradient_variance.main(options)
    variances = read_json(tmp_path / "gradient_variance.json")["variances"]
    assert list(variances) == list(gradient_variance.ESTIMATORS)
    assert all(value > 0 for row in variances.values() for value in row.values())
    text = (tmp_path / "gradient_variance.md").read_text()
    assert "| functions, analytic KL | 1 | 1 |" in text
    assert "3 draws, seed 0" in text


@pytest.mark.usefixtures("few_digits")
def test_newton(tmp_path, monkeypatch):
    monkeypatch.setattr(newton, "TRAINED", ("vae", "newton:1"))
    monkeypatch.setattr(newton, "UNTRAINED", ("sa:1",))
    monkeypatch.setattr(newton, "END_TO_END", ("newton:1",))
    monkeypatch.setattr(newton, "REPEATS", 1)
    monkeypatch.setattr(newton, "REFERENCE_SAMPLES", 100)
    options = {"epochs": 1, "latent_dim": 2, "num_samples": 5, "seeds": 2, "end_to_end": 1}
    options |= {"guide_epochs": 2, "augment": True}
    for _ in range(2):  # the second call finds all cells
        newton.main(newton.Options(**options, out=tmp_path))
    (tmp_path / "newton_mnist5k_p2" / "seed-1" / "sa-1.json").unlink()
    newton.main(newton.Options(**options, only_finished=True, out=tmp_path))
    rows = read_json(tmp_path / "newton_mnist5k_p2.json")["rows"]
    shares = {(row["seed"], row["guide"]): row.get("share") for row in rows}
    assert len(shares) == len({(row["seed"], row["guide"]) for row in rows}) == 9
    assert shares[0, "encoder of the VAE"] == 0
    text = (tmp_path / "newton_mnist5k_p2.md").read_text()
    assert "| `newton:1` (2) |" in text
    assert "| `newton:1` (1) | equal time | 1 |" in text
    assert "1 epochs for the VAE and 2 more for every trained guide, on images" in text
    assert (tmp_path / "newton_mnist5k_p2.png").exists()


def test_newton_limits(tmp_path):
    options = {"epochs": 1, "train_images": 96, "images": 4, "scored_images": 8, "num_samples": 3}
    newton_limits.main(newton_limits.Options(**options, out=tmp_path))
    gaps = read_json(tmp_path / "newton_limits.json")["gaps"]
    assert gaps.keys() == {"test", "training"}
    text = (tmp_path / "newton_limits.md").read_text()
    assert text.count("| `newton:1`") == 3
    assert text.count(" to ") == len(newton_limits.SCORES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fewer than 3 of:UserWarning")
def test_ais_cost(tmp_path):
    options = ais_cost.Options(
        epochs=1, latent_dim=2, images=2, samples=[5], steps=[2], chains=4, repeats=1, out=tmp_path
    )
    ais_cost.main(options)
    rows = read_json(tmp_path / "ais_cost.json")["rows"]
    found = [f"{row['method']} {row['start']}" for row in rows]
    assert found == ["IWAE encoder", "IWAE optimum", "AIS prior", "AIS encoder", "AIS optimum"]


@pytest.mark.parametrize(
    "module",
    [ais_cost, alternating, gradient_variance],
    ids=lambda module: module.__name__,
)
def test_committed_pages_are_those_of_the_committed_records(module, tmp_path):
    name = module.__name__
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    module.main(module.Options(render=True, out=tmp_path))
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("newton_*_p*.json")), ids=lambda p: p.stem)
def test_committed_pages_of_newton_are_those_of_the_committed_records(path, tmp_path):
    shutil.copy(path, tmp_path)
    record = read_json(path)
    options = {"data": record["data"], "latent_dim": record["latent_dim"]}
    newton.main(newton.Options(**options, render=True, out=tmp_path))
    page = path.with_suffix(".md")
    assert (tmp_path / page.name).read_text() == page.read_text()
