"""The comparison's arithmetic and its files, on known numbers and on a tiny run."""

import compare
import pandas as pd
import pytest
from _gap_against_time import gap_against_time
from matplotlib.figure import Figure

from pyro_gpvae.core._files import read_json


def record():
    def row(seed, guide, decoder, elbo, optimum, ms):
        times = {"ms": ms, "ms_low": ms * 0.9, "ms_high": ms * 1.1, "decoder_passes": ms / 2}
        scores = {"elbo": elbo, "log_evidence": elbo + 5, "monte_carlo_error": 0.1}
        return {
            "seed": seed, "guide": guide, "decoder": decoder, "optimum": optimum,
            "training_seconds": 1.0, **scores, **times,
        }  # fmt: skip

    return {
        "options": {"data": "toy", "latent_dim": 2, "epochs": 3, "num_samples": 5, "seeds": 2},
        "data": {"train_images": 10, "test_images": 4},
        "device": "a processor",
        "threads": 1,
        "rows": [
            row(0, "vae", "end to end", 60.0, 100.0, 2.0),
            row(0, "vlae:1", "VAE's decoder", 92.0, 100.0, 20.0),
            row(1, "vae", "end to end", 50.0, 100.0, 2.0),
            row(1, "vlae:1", "VAE's decoder", 95.0, 100.0, 40.0),
            row(1, "iaf:2", "end to end", 10.0, 120.0, 3.0),
        ],
    }


def test_shares_of_known_gaps():
    table = compare.summarise(record()).set_index("guide")
    assert table.loc["vae", "share"] == 0
    # 1 - 8/40 and 1 - 5/50, averaged
    assert table.loc["vlae:1", "share"] == pytest.approx(0.85)
    assert table.loc["vlae:1", "share_sd"] == pytest.approx(0.1 / 2**0.5)
    # another decoder: its own gap of 110 against the VAE's 50 of the same seed
    assert table.loc["iaf:2", "share"] == pytest.approx(1 - 110 / 50)
    text = compare.markdown(compare.summarise(record()), compare.caption(record()))
    assert "| `vlae:1` | – | – | – | – | 93.5 | 98.5 | 85 ± 7 % | 15.0 |" in text
    assert "| `iaf:2` | 10.0 | 15.0 | 120.0 | -120 % | – | – | – | 1.5 |" in text
    assert "3 epochs (the paper: 2000), K = 5, 2 seeds." in text


def test_figure_shows_every_guide():
    figure = gap_against_time(compare.summarise(record()), "caption")
    assert isinstance(figure, Figure)
    labels = figure.axes[-1].get_legend().get_texts()
    assert {label.get_text() for label in labels} == {"vae", "vlae:1", "iaf:2"}
    assert [axes.get_title() for axes in figure.axes] == ["end to end", "VAE's decoder"]
    with pytest.raises(ValueError, match="columns"):
        gap_against_time(compare.summarise(record()).drop(columns="ms"))


def test_a_number_stands_beside_the_points_of_a_family_with_several():
    table = compare.summarise(record())
    other = table[table["guide"] == "vlae:1"].assign(guide="vlae:0,damping=1", share=0.1)
    axes = gap_against_time(pd.concat([table, other]), "caption").axes[-1]
    labels = [label.get_text() for label in axes.get_legend().get_texts()]
    assert labels == ["vae", "iaf:2", "vlae:0, 1"]
    assert {"0", "1"} <= {text.get_text() for text in axes.texts}


def test_a_tiny_comparison_writes_its_files_and_repeats_nothing(tmp_path, capsys):
    options = compare.Options(
        epochs=1, latent_dim=4, train_images=64, test_images=8, num_samples=5,
        guides=("lowrank:4", "vlae:1"), device="cpu", out=tmp_path,
    )  # fmt: skip
    compare.main(options)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"seed-0", "compare.json", "compare.md", "compare.csv", "compare.png"}
    rows = read_json(tmp_path / "compare.json")["rows"]
    assert {(row["guide"], row["decoder"]) for row in rows} == {
        (guide, decoder)
        for guide in ("vae", "lowrank:4", "vlae:1")
        for decoder in ("end to end", "VAE's decoder")
    }
    assert all(row["optimum"] > row["elbo"] for row in rows)
    assert f"training {tmp_path}" in capsys.readouterr().out
    compare.main(options)
    assert f"training {tmp_path}" not in capsys.readouterr().out
