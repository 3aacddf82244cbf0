"""The benchmarks run with tiny settings, their arithmetic is right, and their pages can be made."""

import shutil
import sys
import time
from functools import partial
from pathlib import Path

import _handwritten
import evaluation
import peer
import pyro
import pytest
import step
import torch
from _bench import Options, Quartiles, Timings, interleave, short
from pyro.infer import TraceMeanField_ELBO

from guides import GaussianGuide
from pyro_gpvae import ImageModel, PerImage
from pyro_gpvae.core._files import read_json
from pyro_gpvae.model.networks import build_decoder, build_encoder

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TINY = {"rounds": 2, "seconds": 1e-4, "device": "cpu"}


@pytest.fixture(autouse=True)
def empty_store():
    yield
    pyro.clear_param_store()  # filled by plain SVI


def test_ratios_are_taken_within_a_round():
    timings = Timings({"slow": [2.0, 30.0, 300.0, 3.0], "fast": [1.0, 10.0, 100.0, 1.0]})
    assert timings.ratio("slow", "fast") == Quartiles(2.75, 3.0, 3.0)
    assert timings.of("fast") == Quartiles(1.0, 5.5, 32.5)
    lines = timings.table("fast").splitlines()
    assert lines[0] == "| | ratio to fast | ms |"
    assert lines[2] == "| slow | 3.00 (2.75 to 3.00) | 16,500 (2,750 to 97,500) |"
    assert [short(v) for v in (0.01234, 12.345, 12345.6)] == ["0.0123", "12.3", "12,346"]


def test_variants_take_turns_in_another_order_each_round(monkeypatch):
    now, calls, seconds = 0.0, [], {"a": 1.0, "b": 4.0, "c": 64.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def call(name):
        nonlocal now
        now += seconds[name]
        calls.append(name)

    programs = {name: partial(call, name) for name in seconds}
    options = Options(rounds=20, seconds=8.0)
    timings = interleave(programs, torch.device("cpu"), options, warm_up=1)
    assert timings.seconds == {name: [seconds[name]] * 20 for name in "abc"}
    # one call to warm up, one that tells how many calls a timing takes: 8, 2 and at least 1
    assert [calls.count(name) for name in "abc"] == [2 + 160, 2 + 40, 2 + 20]
    assert {calls[6:][i * 11] for i in range(20)} == {"a", "b", "c"}


def test_handwritten_networks_are_those_of_table_1():
    net = _handwritten.NETS["conv"]
    for mine, ours in (
        (_handwritten.features(net), build_encoder(net.image_shape)),
        (_handwritten.decoder(net), build_decoder(net.image_shape, net.latent_dim)),
    ):
        with torch.no_grad():
            for parameter, value in zip(mine.parameters(), ours.parameters(), strict=True):
                assert parameter.shape == value.shape
                parameter.copy_(value)
        shape = (3, *net.image_shape) if mine[0].weight.dim() == 4 else (3, net.latent_dim)
        x = torch.randn(shape)
        torch.testing.assert_close(mine(x), ours(x))


def test_handwritten_loss_is_ours_up_to_a_constant():
    net = _handwritten.NETS["tiny"]
    vae = _handwritten.VAE(net).double()
    model = ImageModel(net.image_shape, net.latent_dim, vae.decoder, sigma=2.0)
    guide = GaussianGuide(model, vae.encoder[:-1])
    guide.head = vae.encoder[-1]
    model, guide = model.double(), guide.double()
    with torch.no_grad():
        vae.log_sigma.copy_(model.log_sigma)
    x = torch.rand(32, *net.image_shape, dtype=torch.float64)
    torch.manual_seed(0)
    pair = PerImage(model, 100), PerImage(guide, 100)
    ours = TraceMeanField_ELBO().differentiable_loss(*pair, x)
    torch.manual_seed(0)
    constant = 32 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(vae.loss(x) + constant, ours)


def test_step(tmp_path, monkeypatch):
    monkeypatch.setitem(step.NETS, "conv", _handwritten.Net("conv", (1, 28, 28), 2, 4))
    step.main(step.StepOptions(**TINY, backends=("eager",), images=64, out=tmp_path))
    record = read_json(tmp_path / "step_cpu.json")
    for net in ("conv", "tiny"):
        seconds = record[net]["step_seconds"]
        assert list(seconds) == ["hand-written", "SVI", "SVI, tuned", "vae, eager", "gp, eager"]
        assert all(len(found) == 2 for found in seconds.values())
    assert {"device", "threads", "versions", "commit", "rounds"} <= set(record)
    assert "Median (quartiles) of 2 rounds" in (tmp_path / "step_cpu.md").read_text()


def test_evaluation(tmp_path):
    options = evaluation.EvaluationOptions(
        **TINY, guides=("vae", "vlae:1"), latent_dims=(2,), samples=4, images=3, out=tmp_path
    )
    evaluation.main(options)
    names = ["decoder", "vae", "vae, q(z\\|x) alone", "vlae:1", "vlae:1, q(z\\|x) alone"]
    assert list(read_json(tmp_path / "evaluation_cpu.json")["p = 2"]["seconds"]) == names


@pytest.mark.parametrize("module", [step, evaluation, peer], ids=lambda m: m.__name__)
def test_committed_pages_are_those_of_the_committed_records(module, tmp_path):
    (record,) = RESULTS.glob(f"{module.__name__}*.json")
    shutil.copy(record, tmp_path)
    options = next(
        value
        for name, value in vars(module).items()
        if name.endswith("Options") and value.__module__ == module.__name__
    )
    module.main(options(render=True, out=tmp_path, device="cpu"))
    made = (tmp_path / record.name).with_suffix(".md")
    assert made.read_text() == (RESULTS / made.name).read_text()


PEER = """
import json, sys
request = json.loads(sys.argv[1])
print("a library's message")
answer = {"torch": "TORCH", "mean": 0.0}
if request["task"] == "train":
    answer["epoch"] = 2.0 if request.get("fused") else 4.0
else:
    answer["seconds"] = 1 / max(request["batch_sizes"])
print(json.dumps(answer))
"""


@pytest.mark.slow
def test_peer(tmp_path, monkeypatch):
    """Another program answers in place of pythae."""
    script = tmp_path / "peer.py"
    script.write_text(PEER.replace("TORCH", torch.__version__))
    monkeypatch.setattr(peer, "CHECK_SAMPLES", 50)
    options = peer.PeerOptions(
        **TINY, peer=Path(sys.executable), script=script, latent_dims=(2,), images=256,
        guides=("vae",), test_images=4, samples=3, peer_batches=(10, 20), check_epochs=1,
        backend="eager", out=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"0.000 in pythae, a difference of .* standard errors"):
        peer.main(options)  # the peer's score is wrong
    check = {"ours": 1.0, "peer": 1.0, "standard_errors": 0.0}
    monkeypatch.setattr(peer, "same_quantity", lambda *_: check)
    peer.main(options)
    found = read_json(tmp_path / "peer_cpu.json")["vae, p = 2"]["seconds_per_image"]
    assert found["peer, training"] == [4 / 256] * 2
    assert found["peer, log p(x)"] == [1 / 20] * 2
    assert all(value > 0 for value in found["ours, training"] + found["ours, log p(x)"])
    script.write_text(PEER.replace("TORCH", "1.0"))
    with pytest.raises(ValueError, match=r"both need torch .*, found 1.0"):
        peer.main(options)
