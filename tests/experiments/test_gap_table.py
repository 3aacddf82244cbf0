"""The gap table: trained, measured and written once, then rendered from the record."""

import gap_table
import pytest

from pyro_gpvae.runs import gap_chunks


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
    monkeypatch.setattr(gap_chunks, "decompose", None)
    gap_table.main(options)
    assert "to train 0 of 4 runs" in capsys.readouterr().out
    assert (results / "gap.md").read_text() == text
    options.epochs = 2
    with pytest.raises(ValueError, match="epochs = 1, not 2"):
        gap_table.main(options)
