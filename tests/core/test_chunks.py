"""Chunks are halved where a GPU runs out of memory, and the numbers are those of smaller chunks."""

import logging

import pytest
import torch
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import log_evidence
from pyro_gpvae.core._chunks import halving_chunks

CPU = torch.device("cpu")


def too_large(limit):
    """Work that draws as many numbers as the chunk size, and fails above the limit."""

    def work(size):
        noise = torch.randn(size)
        if size > limit:
            raise torch.cuda.OutOfMemoryError("fake")
        return noise

    return work


@pytest.mark.parametrize(("limit", "halvings"), [(50, 1), (30, 2)])
def test_chunks_are_halved_from_the_same_random_state(limit, halvings, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        found = halving_chunks(too_large(limit), 100, CPU)
    assert len(caplog.records) == halvings
    assert f"chunk_size={100 // 2**halvings}" in caplog.text
    torch.manual_seed(0)
    assert torch.equal(found, torch.randn(100 // 2**halvings))


def test_one_that_does_not_fit_is_an_error():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        halving_chunks(too_large(0), 100, CPU)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        halving_chunks(too_large(1), 0, CPU)


def test_the_evidence_is_that_of_the_chunk_size_that_fits(monkeypatch):
    model, x = linear_model(), images(4)
    guide = GaussianGuide(model, linear_encoder()).double()
    likelihood = model.likelihood

    def small(z):
        if z[..., 0].numel() > 60:
            raise torch.cuda.OutOfMemoryError("fake")
        return likelihood(z)

    monkeypatch.setattr(model, "likelihood", small)
    found = log_evidence(model, guide, x, 90, chunk_size=220, seed=0)
    monkeypatch.undo()
    expected = log_evidence(model, guide, x, 90, chunk_size=55, seed=0)
    assert found.chunk_size == expected.chunk_size == 55
    assert torch.equal(found.log_evidence, expected.log_evidence)
    other = log_evidence(model, guide, x, 90, chunk_size=220, seed=0)
    assert not torch.equal(found.log_evidence, other.log_evidence)
