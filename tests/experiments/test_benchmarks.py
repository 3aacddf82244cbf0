"""The benchmarks run, with tiny settings, and their arithmetic is right."""

import sys
import time
from pathlib import Path

import _bench
import _handwritten
import evaluation
import peer
import pyro
import pytest
import step
import torch
from _bench import Ceilings, Options, Quartiles, Timings, Work, interleave, short
from _report import Report, Target, profile
from _worker import Worker
from pyro.infer import TraceMeanField_ELBO

from guides import GaussianGuide
from pyro_gpvae import ImageModel, PerImage
from pyro_gpvae.core._files import read_json
from pyro_gpvae.model.networks import build_decoder, build_encoder

FOLDER = Path(step.__file__).parent
CPU = torch.device("cpu")
TINY = {"rounds": 2, "seconds": 1e-4, "device": "cpu"}


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch):
    """No time is spent on measuring what the machine can do."""
    monkeypatch.setattr(Ceilings, "measure", lambda device: Ceilings(10.0, 1.0))
    yield
    pyro.clear_param_store()  # plain SVI's


class TestTimings:
    def test_ratios_are_taken_within_a_round(self):
        timings = Timings({"slow": [2.0, 30.0, 300.0, 3.0], "fast": [1.0, 10.0, 100.0, 1.0]})
        assert timings.ratio("slow", "fast") == Quartiles(2.75, 3.0, 3.0)
        assert timings.of("fast") == Quartiles(1.0, 5.5, 32.5)
        assert timings.fastest(["slow", "fast"]) == "fast"

    def test_table(self):
        timings = Timings({"ours": [0.002, 0.002, 0.002], "theirs": [0.004, 0.006, 0.008]})
        lines = timings.table("ours", {"ours": 0.001, "theirs": 0.002}).splitlines()
        assert lines[0] == "| | ratio to ours | ms | times the limit |"
        assert lines[2] == "| ours | 1.00 (1.00 to 1.00) | 2.00 (2.00 to 2.00) | 2.00 |"
        assert lines[3] == "| theirs | 3.00 (2.50 to 3.50) | 6.00 (5.00 to 7.00) | 3.00 |"

    def test_turns(self, monkeypatch):
        now, calls = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: now)

        def program(name, seconds):
            def call():
                nonlocal now
                now += seconds
                calls.append(name)

            return call

        programs = {"a": program("a", 1.0), "b": program("b", 4.0), "c": program("c", 64.0)}
        options = Options(rounds=20, seconds=8.0)
        timings = interleave(programs, CPU, options, warm_up=1)
        assert timings.seconds == {"a": [1.0] * 20, "b": [4.0] * 20, "c": [64.0] * 20}
        # once to warm up and once to choose how many calls a timing is: 8, 2 and, at least, 1
        assert [calls.count(name) for name in "abc"] == [2 + 160, 2 + 40, 2 + 20]
        turns = calls[6:]
        starts = [turns[i * 11] for i in range(20)]
        assert set(starts) == {"a", "b", "c"}, "the order changes from round to round"

    def test_numbers(self):
        assert [short(v) for v in (0.01234, 1.0, 12.345, 123.4, 12345.6)] == [
            "0.0123",
            "1.00",
            "12.3",
            "123",
            "12,346",
        ]


class TestTargets:
    def test_at_most(self):
        assert Target("step", 0.85, 0.85).reached is True
        assert Target("step", 0.85, 0.851).reached is False
        assert str(Target("step", 0.85, 0.5)) == "reached: step, 0.500 (at most 0.85)"
        assert str(Target("step", 0.85, 1.5)) == "**missed**: step, 1.50 (at most 0.85)"

    def test_at_least(self):
        assert Target("speed", 10, 10.0, at_least=True).reached is True
        assert Target("speed", 10, 9.9, at_least=True).reached is False
        assert "at least 10" in str(Target("speed", 10, 9.9, at_least=True))

    def test_not_measured(self):
        assert Target("step", 1, None).reached is None
        assert str(Target("step", 1, None)) == "not measured: step (at most 1)"

    def test_report(self, tmp_path, capsys):
        options = Options(rounds=5, device="cpu", out=tmp_path)
        report = Report("name", "Title", options, "Caption.", Ceilings(10, 2))
        report.targets.append(Target("step", 1, 2.0))
        report.tables["Table"] = "| a |"
        report.record["seconds"] = [1.0]
        report.write()
        page = (tmp_path / "name_cpu.md").read_text()
        assert page in capsys.readouterr().out
        assert "* **missed**: step, 2.00 (at most 1)" in page
        assert "Median (quartiles) of 5 rounds" in page
        assert "10 GFLOP/s" in page
        assert "thread" in page
        record = read_json(tmp_path / "name_cpu.json")
        assert record["targets"][0]["reached"] is False
        assert record["seconds"] == [1.0]
        assert {"device", "threads", "versions", "commit", "rounds"} <= set(record)


class TestLimits:
    def test_work_of_a_step(self):
        linear = torch.nn.Linear(10, 20)
        x = torch.zeros(5, 10)
        work = Work.of(lambda: linear(x).sum().backward(), linear.parameters(), x)
        # the product, and that for the gradient of the weights; x needs none
        assert work.flops == 2 * (2 * 5 * 10 * 20)
        assert work.bytes == 4 * (7 * (10 * 20 + 20) + 50)
        linear.requires_grad_(False)
        work = Work.of(lambda: linear(x), linear.parameters(), x)
        assert (work.flops, work.bytes) == (2 * 5 * 10 * 20, 4 * (10 * 20 + 20 + 50))

    def test_the_slower_of_both_decides(self):
        ceilings = Ceilings(gflops=10, gb_per_second=1)
        assert ceilings.limit(Work(flops=20e9, bytes=1e9)) == 2
        assert ceilings.limit(Work(flops=20e9, bytes=3e9)) == 3

    def test_ceilings(self, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setattr(
            _bench,
            "interleave",
            lambda programs, *_: Timings({"matmul": [2.0, 1.0], "copy": [0.5, 0.25]}),
        )
        ceilings = Ceilings.measure(CPU)
        assert ceilings.gflops == pytest.approx(2 * 1024**3 / 1e9)
        assert ceilings.gb_per_second == pytest.approx(2 * 2**28 / 0.25 / 1e9)

    def test_profile_names_the_expensive_operator(self):
        a = torch.randn(300, 300)
        lines = profile(lambda: a @ a, CPU, seconds=0.01).splitlines()
        assert lines[2].startswith("| `aten::mm` |")
        assert lines[2].endswith("| 1 |")


class TestHandWritten:
    def test_networks_are_those_of_table_1(self):
        net = _handwritten.NETS["conv"]
        for mine, ours in (
            (_handwritten.features(net), build_encoder(net.image_shape)),
            (_handwritten.decoder(net), build_decoder(net.image_shape, net.latent_dim)),
        ):
            shapes = [[p.shape for p in module.parameters()] for module in (mine, ours)]
            assert shapes[0] == shapes[1]
            with torch.no_grad():
                for parameter, value in zip(mine.parameters(), ours.parameters(), strict=True):
                    parameter.copy_(value)
            shape = (3, *net.image_shape) if mine[0].weight.dim() == 4 else (3, net.latent_dim)
            x = torch.randn(shape)
            torch.testing.assert_close(mine(x), ours(x))

    def test_loss_is_ours_but_for_a_constant(self):
        net = _handwritten.NETS["tiny"]
        vae = _handwritten.VAE(net).double()
        model = ImageModel(net.image_shape, net.latent_dim, vae.decoder, sigma=2.0)
        guide = GaussianGuide(model, vae.encoder[:-1])
        guide.head = vae.encoder[-1]
        model, guide = model.double(), guide.double()
        with torch.no_grad():
            vae.log_sigma.copy_(model.log_sigma)
        x = torch.rand(32, *net.image_shape, dtype=torch.float64)
        pair = PerImage(model, 100), PerImage(guide, 100)
        torch.manual_seed(0)
        ours = TraceMeanField_ELBO().differentiable_loss(*pair, x)
        torch.manual_seed(0)
        constant = 32 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        torch.testing.assert_close(vae.loss(x) + constant, ours)

    def test_step_trains(self):
        net = _handwritten.NETS["tiny"]
        torch.manual_seed(0)
        vae = _handwritten.VAE(net)
        images = torch.randint(256, (32, *net.image_shape), dtype=torch.uint8)
        train = _handwritten.eager(vae, images, learning_rate=1e-2)
        losses = [float(train(torch.arange(32))) for _ in range(60)]
        assert losses[-1] < losses[0] - 5


def test_step(tmp_path, monkeypatch):
    small = _handwritten.Net("conv", (1, 28, 28), 2, 4)
    monkeypatch.setitem(step.NETS, "conv", small)
    step.main(step.StepOptions(**TINY, backends=("eager",), images=64, out=tmp_path))
    record = read_json(tmp_path / "step_cpu.json")
    names = [target["name"] for target in record["targets"]]
    assert names[:3] == [
        "conv, vae, eager / hand-written",
        "conv, gp, eager / vae, eager",
        "conv, inference, GPVAE / VAE",
    ]
    assert len(names) == 6
    assert [target["limit"] for target in record["targets"]] == [0.85, 1.1, 1.05, 1.0, 1.1, 1.05]
    seconds = record["conv"]["step_seconds"]
    assert list(seconds) == [
        "hand-written",
        "SVI",
        "SVI, tuned",
        "vae, eager",
        "gp, eager",
    ]
    assert all(len(found) == 2 for found in seconds.values())
    assert record["conv"]["flops"] > record["tiny"]["flops"] > 0
    page = (tmp_path / "step_cpu.md").read_text()
    # tiny and slow: what is missed comes with a profile
    assert "**missed**: conv" in page
    assert "## conv: profile of hand-written" in page


def test_targets_on_cuda():
    timings = Timings(
        {
            "hand-written": [8.0],
            "hand-written, captured": [1.0],
            "SVI": [11.0],
            "vae, captured": [1.05],
            "gp, captured": [1.2],
        }
    )
    svi, graph, gp = step.step_targets("conv", timings, "vae, captured", cuda=True)
    assert (svi.measured, svi.limit, svi.reached) == (pytest.approx(11 / 1.05), 10, True)
    assert (graph.measured, graph.limit, graph.reached) == (pytest.approx(1.05), 1.1, True)
    assert (gp.measured, gp.reached) == (pytest.approx(1.2 / 1.05), False)


@pytest.mark.parametrize("tuned", [False, True])
def test_plain_svi_trains(tuned):
    net = _handwritten.NETS["tiny"]
    torch.manual_seed(0)
    images = torch.randint(256, (32, *net.image_shape), dtype=torch.uint8)
    train = step.svi(_handwritten.VAE(net), images, f"test.{tuned}", tuned=tuned)
    losses = [train(torch.arange(32)) for _ in range(60)]
    assert losses[-1] < losses[0] - 10


def test_batches_come_from_a_permutation():
    seen = []
    program = step.on_batches(seen.append, torch.zeros(10), 4)
    for _ in range(4):
        program()
    assert [len(index) for index in seen] == [4, 4, 4, 4]
    assert len(set(torch.cat(seen[:2]).tolist())) == 8
    assert torch.equal(seen[0], seen[2])


def test_evaluation(tmp_path):
    options = evaluation.EvaluationOptions(
        **TINY,
        guides=("vae", "vlae:1"),
        latent_dims=(2,),
        samples=4,
        images=3,
        memory_samples=(2, 4, 6),
        memory_images=(3, 6),
        epochs=1,
        train_images=32,
        out=tmp_path,
    )
    evaluation.main(options)
    record = read_json(tmp_path / "evaluation_cpu.json")
    names = [target["name"] for target in record["targets"]]
    assert names == [
        "vae, p = 2: evaluation / decoder",
        "vlae:1, p = 2: evaluation / decoder",
        "vae: peak memory, K = 6 / K = 2",
        "gp: peak memory, K = 6 / K = 2",
    ]
    assert record["targets"][1]["reached"] is False, "it optimises"
    assert set(record["p = 2"]["seconds"]) == {
        "decoder",
        "vae",
        "vae, q(z\\|x) alone",
        "vlae:1",
        "vlae:1, q(z\\|x) alone",
    }
    assert set(record["memory, gp"]) == {
        "K = 2, B = 3",
        "K = 4, B = 3",
        "K = 6, B = 3",
        "K = 2, B = 6",
    }
    assert record["precisions"]["tf32"]["largest_difference"] == 0
    assert 0 < record["precisions"]["bf16"]["largest_difference"] < 10
    assert "## p = 2: profile of vlae:1" in (tmp_path / "evaluation_cpu.md").read_text()


def test_page_faults():
    before = _bench.page_faults()
    torch.zeros(1 << 26, dtype=torch.uint8).fill_(1)  # 64 MiB: a mapping of its own, always new
    assert _bench.page_faults() - before >= 32  # pages of 2 MiB, where the kernel has them


PEER = """
import sys
sys.path.insert(0, {folder!r})
from _worker import serve

class Peer:
    def setup(self, **request):
        print("a library's message")
        self.images = 64
        return {{"torch": {torch!r}}}
    def train(self, epochs, fused=False):
        return {{"first": 9.0, "epoch": 2.0 if fused else 4.0, "page_faults": 300.0}}
    def nll(self, num_images, num_samples, batch_size):
        return {{"seconds": 1 / batch_size, "mean": 0.0}}
    def load(self, path):
        pass

serve(Peer())
"""


class TestPeer:
    def test_runs(self, tmp_path):
        script = tmp_path / "peer.py"
        script.write_text(PEER.format(folder=str(FOLDER), torch=torch.__version__))
        options = peer.PeerOptions(
            **TINY,
            peer=Path(sys.executable),
            script=script,
            latent_dims=(2,),
            images=256,
            test_images=2,
            samples=3,
            peer_batches=(10, 20),
            check_images=64,
            check_epochs=1,
            check_samples=50,
            backend="eager",
            out=tmp_path,
        )
        peer.main(options)
        record = read_json(tmp_path / "peer_cpu.json")
        check, *figures = record["targets"]
        assert [figure["name"] for figure in figures] == [
            "vae, p = 2, training: pythae's time / ours",
            "vae, p = 2, log p(x): pythae's time / ours",
            "iaf, p = 2, training: pythae's time / ours",
            "iaf, p = 2, log p(x): pythae's time / ours",
        ]
        assert [figure["limit"] for figure in figures] == [1.25, 1.35, 1.25, 1.35]
        assert check["reached"] is False, "the peer's score is nonsense"
        vae = record["vae, p = 2"]
        assert vae["peer_batch_size"] == 20, "the fastest"
        assert vae["seconds_per_image"]["peer, training"] == [4 / 256] * 2
        assert vae["seconds_per_image"]["peer, training, peer's Adam fused"] == [2 / 256] * 2
        assert all(value > 0 for value in vae["seconds_per_image"]["ours, training"])
        assert vae["seconds_until_first_epoch_ends"]["peer"] == [9.0] * 6
        faults = vae["minor_page_faults_per_step"]
        assert faults["peer, training"] == [150.0] * 2, "an epoch has two steps"
        assert len(faults["ours, training"]) == 2
        assert len(vae["epoch_end_steps"]) == 2
        assert all(steps > 0 for steps in vae["epoch_end_steps"])
        page = (tmp_path / "peer_cpu.md").read_text()
        assert "Minor page faults of a step: ours, training " in page
        assert "peer, training 150 (150 to 150); " in page

    def test_table(self):
        timings = Timings(
            {
                "ours, training": [0.5, 0.5],
                "peer, training": [1.0, 1.0],
                "peer, training, peer's Adam fused": [0.75, 0.75],
                "ours, log p(x)": [0.001, 0.001],
                "peer, log p(x)": [0.004, 0.004],
            }
        )
        lines = peer.table(timings, {"training": 0.25, "log p(x)": 0.0005}).splitlines()
        assert lines[2] == "| training | 2.00 (2.00 to 2.00) | 2.00 | 1.00 | 2.00 |"
        assert lines[3] == (
            "| training, peer's Adam fused | 1.50 (1.50 to 1.50) | 2.00 | 1.33 | 2.00 |"
        )
        assert lines[4] == "| log p(x) | 4.00 (4.00 to 4.00) | 1,000 | 250 | 2.00 |"

    def test_other_torch_is_refused(self, tmp_path):
        class Fake:
            def __init__(self, torch):
                self.torch = torch

            def ask(self, do, **values):
                return {"torch": self.torch}

        options = peer.PeerOptions(**TINY, images=4, test_images=1)
        workers = {"ours": Fake("2.13.0"), "peer": Fake("1.0")}
        with pytest.raises(ValueError, match=r"the same torch, found .*1\.0"):
            peer.setup(workers, options, "vae", 2, peer.random_images(options), tmp_path)

    def test_worker_that_fails(self, tmp_path, capfd):
        script = tmp_path / "peer.py"
        script.write_text(PEER.format(folder=str(FOLDER), torch=torch.__version__))
        with Worker(sys.executable, script) as worker:
            assert worker.ask("setup") == {"torch": torch.__version__}
            with pytest.raises(RuntimeError, match="ended with 1 when it was asked to nll"):
                worker.ask("nll", num_images=1, num_samples=1, batch_size=0)
        assert "ZeroDivisionError" in capfd.readouterr().err
