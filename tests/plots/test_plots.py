"""Pictures: what they show of arrays and tables, with names and units, and no global state."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from pyro_gpvae import plots

IMAGES = np.random.default_rng(0).integers(256, size=(10, 1, 8, 8), dtype=np.uint8)


def history(epochs, **columns):
    return pd.DataFrame({"epoch": range(1, epochs + 1), "loss": 5.0, "sigma": 0.1} | columns)


def shown(axes):
    return np.asarray(axes.images[0].get_array())[..., 0]


def texts(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\N{NO-BREAK SPACE}", " ")


def test_loss_curves_show_each_run_with_units(tmp_path):
    before = dict(rcParams)
    histories = {"VAE": history(20), "GPVAE": history(1, validation_elbo=-6.0)}
    figure = plots.loss_curves(histories, "K = 5, seed 0")
    figure.savefig(tmp_path / "loss.png")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["VAE", "GPVAE", "GPVAE, held out"]
    assert left.lines[0].get_ydata()[0] == -5
    assert left.lines[1].get_marker() == "o", "a single epoch is a point, not an invisible line"
    assert "nats per image" in left.get_ylabel()
    assert "epoch" in right.get_xlabel()
    assert "K = 5, seed 0" in texts(figure)
    assert dict(rcParams) == before, "no global state"


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_places_every_image(channels):
    images = np.full((5, channels, 4, 6), 255, dtype=np.uint8)
    images[3] = 0
    figure = plots.image_grid({"a": images, "b": images / 255.0}, columns=2, title="t")
    first, second = map(shown, figure.axes)
    assert first.shape[:2] == (3 * 4 + 2 * 2, 2 * 6 + 2)
    assert (first[6:10, 8:14] == 0).all(), "the fourth image is in row 2, column 2"
    assert (first[:6] == 1).all()
    np.testing.assert_allclose(first, second, err_msg="uint8 and floats look alike")


def test_reconstructions_are_below_their_images():
    figure = plots.reconstructions(IMAGES, {"VAE": IMAGES / 255 + 2.0}, "caption")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["image", "VAE"]
    assert (shown(axes)[10:] == 1).all(), "clipped"
    np.testing.assert_allclose(shown(axes)[:8, :8], IMAGES[0, 0] / 255)


def test_missed_images_give_the_nats_in_digits_that_are_known():
    gaps = [1021.73, 12.34, 9.87, 0.04, -0.3]
    figure = plots.missed_images(IMAGES[:5], {"VAE": (IMAGES[:5], gaps)})
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == [""] * 5 + ["−1022", "−12", "−9.9", "0.0", "0.0"]


def test_figures_of_images_suit_light_and_dark_pages():
    decoded = {"VAE": (IMAGES, np.ones(10))}
    for figure in (
        plots.image_grid({"a": IMAGES}, caption="c", title="t"),
        plots.reconstructions(IMAGES, {"VAE": IMAGES}),
        plots.missed_images(IMAGES, decoded, "c"),
    ):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())
        assert pixels[0, 0, 3] == 0, "no background"
        assert {text.get_color() for text in figure.findobj(Text)} == {plots._style.GREY}


def test_uncertain_images_are_the_extremes():
    images = np.zeros((9, 1, 2, 2)) + np.arange(9)[:, None, None, None] / 10
    figure = plots.uncertain_images(images, np.array([4, 3, 0, 1, 2, 8, 7, 6, 5]), count=3)
    least, most = map(shown, figure.axes)
    assert [least[0, 0], least[0, 4], least[4, 0]] == pytest.approx([0.2, 0.3, 0.4])
    assert [most[0, 0], most[0, 4], most[4, 0]] == pytest.approx([0.5, 0.6, 0.7])
    assert figure.axes[0].get_title() == "least uncertain (0 to 2)"
    assert len(plots.uncertain_images(images[:2], [1.0, 2.0]).axes) == 2, "fewer than asked for"


COMPONENTS = [*plots.gap._STEPS]


def gaps():
    """Two seeds of one guide and one of another, on four images; the latter beats its reference."""
    rows = [
        dict.fromkeys(("gap", *COMPONENTS), level + image)
        | {"run": run, "label": label, "converged": True}
        for run, label, level in (("a", "gp", 1.0), ("b", "gp", 3.0), ("c", "vae", 5.0))
        for image in range(4)
    ]
    table = pd.DataFrame(rows)
    table.loc[table["label"] == "vae", "encoder"] = -2.0
    return table


def test_gap_ladder_has_a_bar_for_each_guide():
    figure = plots.gap_ladder(gaps(), "K = 5")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["gp", "vae"]
    assert "nats per image" in left.get_xlabel()
    assert "nats" in right.get_xlabel()
    widths = np.array([[bar.get_width() for bar in bars] for bars in left.containers[:5]])
    np.testing.assert_allclose(widths.sum(0), [5 * 3.5, 4 * 6.5 - 2])
    assert min(bar.get_x() + bar.get_width() for bar in left.containers[2]) == -2


def test_the_scatter_names_its_axes():
    table = pd.DataFrame({"gap": [1.0, 2.0, 3.0], "score": [1.0, 5.0, 100.0]})
    (axes,) = plots.uncertainty_scatter(table, {"score": "a score"}, {"score": "ρ = 0.1"}).axes
    assert (axes.get_xlabel(), axes.get_title()) == ("a score", "ρ = 0.1")
    assert "nats" in axes.get_ylabel()
    assert axes.get_xscale() == "log", "it covers more than a factor of 20"


def test_the_latent_map_shows_the_plane_of_largest_variance():
    generator = np.random.default_rng(0)
    plane = generator.normal(size=(50, 2)) * [5, 2]
    basis = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    labels = np.arange(50) % 3
    figure = plots.latent_map(plane @ basis[:2] + 7, labels, "caption")
    (axes,) = figure.axes
    points = np.asarray(axes.collections[0].get_offsets())
    gram = (plane - plane.mean(0)) @ (plane - plane.mean(0)).T
    np.testing.assert_allclose(points @ points.T, gram, atol=1e-9)
    assert "(0 %" not in axes.get_xlabel() + axes.get_ylabel()
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]
    unlabelled = plots.latent_map(plane)
    np.testing.assert_allclose(unlabelled.axes[0].collections[0].get_offsets(), plane)
    assert not unlabelled.axes[0].texts


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.image_grid({"a": IMAGES[:, 0]}), r"C = 1 or 3, got shape \(10, 8, 8\)"),
        (lambda: plots.reconstructions(IMAGES, {"VAE": IMAGES[:3]}), "same shape"),
        (lambda: plots.uncertain_images(IMAGES, np.zeros(3)), "one uncertainty for each"),
        (lambda: plots.uncertain_images(IMAGES, [np.nan] * 10), "10 uncertainties are not finite"),
        (lambda: plots.gap_ladder(gaps().assign(converged=False)), "at least one image"),
        (lambda: plots.latent_map(np.zeros((5, 1))), "p >= 2"),
        (lambda: plots.latent_map(np.zeros((5, 2)), np.zeros(6)), "6 elements"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
