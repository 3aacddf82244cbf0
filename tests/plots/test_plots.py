import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams

from pyro_gpvae.plots import image_grid, loss_curves, reconstructions, uncertain_images

IMAGES = np.random.default_rng(0).integers(256, size=(10, 1, 8, 8), dtype=np.uint8)


def history(epochs, **columns):
    return pd.DataFrame({"epoch": range(1, epochs + 1), "loss": 5.0, "sigma": 0.1} | columns)


def texts(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\N{NO-BREAK SPACE}", " ")


def test_loss_curves_show_each_run_with_units(tmp_path):
    before = dict(rcParams)
    figure = loss_curves({"VAE": history(20), "GPVAE": history(1)}, "K = 5, seed 0")
    figure.savefig(tmp_path / "loss.png")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["VAE", "GPVAE"]
    assert left.lines[0].get_ydata()[0] == -5
    assert left.lines[1].get_marker() == "o", "a single epoch is a point, not an invisible line"
    assert "nats per image" in left.get_ylabel()
    assert "epoch" in right.get_xlabel()
    assert "K = 5, seed 0" in texts(figure)
    assert dict(rcParams) == before, "no global state"


def test_validation_is_drawn_where_there_is_one():
    figure = loss_curves({"VAE": history(3, validation_elbo=-6.0), "GPVAE": history(3)})
    assert len(figure.axes[0].lines) == 3


def test_loss_curves_need_histories():
    with pytest.raises(ValueError, match="at least one history"):
        loss_curves({})
    with pytest.raises(ValueError, match="'VAE' lacks the column 'loss'"):
        loss_curves({"VAE": history(3).drop(columns="loss")})


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_places_every_image(channels, tmp_path):
    images = np.full((5, channels, 4, 6), 255, dtype=np.uint8)
    images[3] = 0
    figure = image_grid({"a": images, "b": images / 255.0}, columns=2, title="t")
    figure.savefig(tmp_path / "grid.png")
    first, second = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert first.shape[:2] == (3 * 4 + 2 * 2, 2 * 6 + 2)
    assert (first[6:10, 8:14] == 0).all(), "the fourth image is in row 2, column 2"
    assert (first[:6] == 1).all()
    np.testing.assert_allclose(first, second, err_msg="uint8 and floats look alike")


def test_image_grid_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"C = 1 or 3, got shape \(10, 8, 8\)"):
        image_grid({"a": IMAGES[:, 0]})
    with pytest.raises(ValueError, match="at least one panel"):
        image_grid({})


def test_reconstructions_are_below_their_images(tmp_path):
    decoded = IMAGES / 255 + 2.0
    figure = reconstructions(IMAGES, {"VAE": decoded}, "caption")
    figure.savefig(tmp_path / "reconstructions.png")
    assert [axes.get_ylabel() for axes in figure.axes] == ["image", "VAE"]
    assert (np.asarray(figure.axes[1].images[0].get_array()) == 1).all(), "clipped"
    with pytest.raises(ValueError, match="'VAE' has shape"):
        reconstructions(IMAGES, {"VAE": IMAGES[:3]})


def test_uncertain_images_are_the_extremes(tmp_path):
    images = np.zeros((9, 1, 2, 2)) + np.arange(9)[:, None, None, None] / 10
    figure = uncertain_images(images, np.array([4, 3, 0, 1, 2, 8, 7, 6, 5]), count=3)
    figure.savefig(tmp_path / "uncertain.png")
    least, most = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert [least[0, 0], least[0, 4], least[4, 0]] == pytest.approx([0.2, 0.3, 0.4])
    assert [most[0, 0], most[0, 4], most[4, 0]] == pytest.approx([0.5, 0.6, 0.7])
    assert figure.axes[0].get_title() == "least uncertain (0 to 2)"
    assert figure.axes[1].get_title() == "most uncertain (8 to 6)"
    assert len(uncertain_images(images[:2], [1.0, 2.0]).axes) == 2, "fewer than asked for"


def test_uncertain_images_need_a_number_each():
    with pytest.raises(ValueError, match="one uncertainty for each"):
        uncertain_images(IMAGES, np.zeros(3))
    with pytest.raises(ValueError, match="1 uncertainties are not finite"):
        uncertain_images(IMAGES, [np.nan, *range(9)])
