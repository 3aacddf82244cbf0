"""Progress bars: where they are shown, and that they end at their total."""

import pytest
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import log_evidence
from pyro_gpvae.core import _progress


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_bar_of_log_evidence_ends_at_all_samples(chunk_size, capsys):
    model = linear_model()
    guide = GaussianGuide(model, linear_encoder()).double()
    options = {"num_samples": 7, "seed": 0, "chunk_size": chunk_size}
    quiet = log_evidence(model, guide, images(5), **options)
    assert capsys.readouterr().err == ""
    found = log_evidence(model, guide, images(5), progress="score", **options)
    assert found.log_evidence.equal(quiet.log_evidence)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("score: 100%")
    assert "35/35" in last


@pytest.mark.parametrize(
    ("shown", "in_notebook", "disabled"),
    [(True, False, False), (False, True, True), (None, False, True), (None, True, False)],
)
def test_none_shows_a_bar_on_terminals_and_in_notebooks(shown, in_notebook, disabled, monkeypatch):
    monkeypatch.setattr(_progress, "IN_NOTEBOOK", in_notebook)
    with _progress.progress_bar(shown, "bar", 3) as bar:
        assert bar.disable is disabled
