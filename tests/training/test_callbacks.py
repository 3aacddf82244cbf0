"""Validation-chosen epochs, and functions that are called after each epoch."""

from functools import partial

import pytest
import torch
from toy import Kill, images, uint8
from trainings import of, tensors, trained

from guides import GaussianGuide
from pyro_gpvae import fit
from pyro_gpvae.training.checkpoint import Checkpoints

pair = partial(of, GaussianGuide)
#: Four images that are fitted at a high rate: the ELBO of others falls again after some epochs.
OVERFIT = {"data": uint8(4), "validation": (255 * images(30, seed=7)).byte(), "learning_rate": 0.2}


def kill(row):
    if row["epoch"] == 10:
        raise Kill


def test_keep_best_ends_with_the_weights_of_the_best_epoch(tmp_path):
    kept, history = trained(pair, epochs=12, keep_best=True, **OVERFIT)
    best = int(history["validation_elbo"].argmax()) + 1
    assert 1 < best < 10
    stopped, _ = trained(pair, epochs=best, **OVERFIT)
    last, same_history = trained(pair, epochs=12, **OVERFIT)
    torch.testing.assert_close(kept, stopped, rtol=0, atol=0)
    assert not torch.equal(kept["guide.head.weight"], last["guide.head.weight"])
    assert history.equals(same_history)

    # and after a stop that comes later than the best epoch
    options = {"epochs": 12, "keep_best": True, **OVERFIT}
    with pytest.raises(Kill):
        trained(pair, checkpoints=Checkpoints(tmp_path, every=1), callbacks=[kill], **options)
    resumed, _ = trained(pair, checkpoints=Checkpoints(tmp_path, resume=True), **options)
    torch.testing.assert_close(resumed, kept, rtol=0, atol=0)


def test_the_best_epoch_is_named():
    model, guide = pair()
    seen = []
    history = fit(
        model, guide, uint8(20), epochs=3, validation=uint8(5), keep_best=True, progress=False,
        callbacks=[lambda row: seen.append((row["validation_elbo"], tensors(model, guide)))],
    )  # fmt: skip
    best = max(range(3), key=lambda epoch: seen[epoch][0])
    assert history.best_epoch == best + 1
    torch.testing.assert_close(tensors(model, guide), seen[best][1], rtol=0, atol=0)


def test_callbacks_see_every_row_in_evaluation_mode_and_change_nothing():
    model, guide = pair()
    rows = []

    def callback(row):
        assert not guide.training
        rows.append(dict(row))
        row["loss"] = 0.0

    history = fit(model, guide, uint8(8), epochs=2, callbacks=[callback], progress=False)
    assert rows == history.rows
    assert trained(pair, callbacks=[])[1].equals(trained(pair)[1])
