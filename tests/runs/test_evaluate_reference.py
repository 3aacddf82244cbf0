"""Reference estimates of a run: in its evaluation's record, its table, and printed."""

import pandas as pd
import pytest

from pyro_gpvae import RunConfig, evaluate_run, train_run
from pyro_gpvae.cli.main import main
from pyro_gpvae.core._files import read_json

pytestmark = pytest.mark.filterwarnings("ignore:no estimate of log p")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig(
        guide="vae", epochs=1, train_images=40, test_images=4, latent_dim=2, num_samples=5,
        decoder="fc", device="cpu",
    )  # fmt: skip
    train_run(config, folder, progress=False)
    return folder


def test_the_estimates_stand_beside_the_score(run, tmp_path):
    out = tmp_path / "evaluation"
    result = evaluate_run(run, reference=3, out=out)
    assert result["scores"] == read_json(run / "record.json")["scores"]
    reference = read_json(out / "record.json")["reference"]
    assert reference == result["reference"]
    assert (reference["num_images"], reference["num_samples"]) == (3, 5)
    names = ["IWAE(5)", "IWAE(5), width c", "IWAE(5), instance:full", "AIS(30)"]
    assert list(reference["estimates"]) == names
    assert 0.8 <= reference["mean_width"] <= 4
    table = pd.read_csv(out / "scores.csv")
    for name in names:
        assert table[name].notna().tolist() == [True, True, True, False]
        mean = reference["estimates"][name]["log_evidence"]
        assert mean == pytest.approx(table[name].mean(), rel=1e-5)


@pytest.mark.parametrize("count", [0, 5])
def test_the_number_of_images_is_checked(run, count):
    with pytest.raises(ValueError, match=f"reference must be 1 to 4 test images, got {count}"):
        evaluate_run(run, reference=count)


def test_the_command_prints_each_estimator(run, capsys):
    assert main(["evaluate", str(run), "--reference", "2"]) == 0
    text = capsys.readouterr().out
    for line in ("of the first 2 test images", "IWAE(5), width c", "mean c =", "AIS(30)",
                 "most reliable", "(equal)"):  # fmt: skip
        assert line in text
