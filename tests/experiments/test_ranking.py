"""The study of all guides, with a budget of seconds."""

import math
import shutil
from pathlib import Path

import pytest
import ranking
from scipy import stats

from pyro_gpvae.core._files import read_json

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_study_trains_what_is_missing_and_renders_its_record(tmp_path, capsys):
    options = ranking.Options(
        epochs=1, seeds=1, latent_dim=2, validation=20, train_images=60, test_images=3,
        reference_images=2, num_samples=3, rows=("gp after vae",), out=tmp_path,
    )  # fmt: skip
    ranking.main(options)
    cells = {
        cell["row"]: cell for cell in read_json(tmp_path / "ranking_mnist5k_conv.json")["cells"]
    }
    assert list(cells) == ["vae", "gp after vae"]
    warm = read_json(tmp_path / "ranking_mnist5k_conv/gp-after-vae-seed0" / "record.json")
    assert warm["warm_start"]["scores"]["log_evidence"] == cells["vae"]["iwae"]
    assert cells["vae"]["train_images"] == 40
    assert cells["vae"]["best_epoch"] == 1
    assert (tmp_path / "ranking_mnist5k_conv.png").stat().st_size > 10_000
    page = (tmp_path / "ranking_mnist5k_conv.md").read_text()
    assert "20 held out and 3 for the scores" in page

    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/record.json")}
    ranking.main(options)
    assert runs == {path: path.stat().st_mtime_ns for path in runs}
    assert (tmp_path / "ranking_mnist5k_conv.md").read_text() == page


def test_differences_are_tested_in_pairs():
    differences = [1.0, 2.0, 4.0]
    expected = stats.ttest_rel([3.0, 5.0, 8.0], [2.0, 3.0, 4.0]).pvalue
    assert ranking.paired_p(differences) == pytest.approx(expected)
    assert math.isnan(ranking.paired_p(differences[:2]))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("ranking_*.json")), ids=lambda p: p.stem)
def test_committed_pages_are_those_of_the_committed_records(path, tmp_path):
    shutil.copy(path, tmp_path)
    record = read_json(path)
    options = {"data": record["data"], "decoder": record["decoder"]}
    ranking.main(ranking.Options(**options, render=True, out=tmp_path))
    page = path.with_suffix(".md")
    assert (tmp_path / page.name).read_text() == page.read_text()


def test_the_scores_of_the_paper_stand_beside_ours():
    scores = ranking.published({"data": "mnist", "decoder": "fc", "latent_dim": 10})
    assert (scores["vae"], scores["gp after vae"]) == ("563.6", "568.7")
    assert "gp" not in scores
    assert ranking.published({"data": "mnist5k", "decoder": "conv", "latent_dim": 10}) == {}
