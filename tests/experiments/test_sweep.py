"""Sweeps: plans are checked before anything is trained; a sweep survives what kills its parts."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sweep
import torch
from _plans import parse_where, read_plan
from _state import finished_runs
from score_tables import TABLE_4, TABLE_5

from pyro_gpvae import train_run
from pyro_gpvae.core._files import read_json, write_json

SWEEP = Path(sweep.__file__)
PLANS = sorted((SWEEP.parents[1] / "plans").glob("*.toml"))

TINY = """
title = "Tiny"
[budget]
epochs = 2
seeds = 3
train_images = 256
test_images = 10
num_samples = 5
[grid]
data = "mnist5k"
latent_dim = 2
decoder = ["conv", "fc"]
[[methods]]
guide = "vae"
[[methods]]
name = "gp after vae"
guide = "gp"
warm_start = "vae"
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path / "tiny.toml"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_can_be_read(path):
    plan = read_plan(path)
    names = [cell.name for cell in plan.cells]
    assert len(names) == len(set(names))
    for number, cell in enumerate(plan.cells):
        start = cell.config.warm_start
        assert start is None or start in names[:number], "those that others start from come first"


def test_the_plans_are_the_papers_tables():
    """Every row of the supplement's tables is a method, at the paper's budget."""
    four, five = (read_plan(SWEEP.parents[1] / "plans" / f"table{n}.toml") for n in (4, 5))
    for plan, table, dims in ((four, TABLE_4, (10, 20, 50)), (five, TABLE_5, (10, 50))):
        cells = {(c.config.guide, c.config.latent_dim) for c in plan.cells}
        assert cells == {(guide, p) for guide in table.guides for p in dims}
        assert plan.budget_overrides == {}
        gp = [c for c in plan.cells if c.config.guide == "gp"]
        assert all(c.config.warm_start and c.config.epochs == 2000 for c in gp)
        controls = [c for c in plan.cells if c.config.guide == "vae" and c.method != "vae"]
        total = {c.config.epochs * (2 if c.config.warm_start else 1) for c in controls}
        assert total == {4000}, "as many epochs as GPVAE and its warm start"
        assert len(controls) == 2 * len(gp)


def test_a_cell_is_named_by_its_options_and_cuts_are_kept(tiny):
    plan, cut = read_plan(tiny), read_plan(tiny, epochs=7, seeds=2)
    assert (len(plan.cells), len(cut.cells)) == (12, 8)
    name, other = plan.cells[0].name, cut.cells[0].name
    assert name.startswith("mnist5k-p2-conv-vae-seed0-")
    assert other[:-8] == name[:-8]
    assert other != name, "another budget is another run"
    gp = next(c for c in plan.cells if c.config.guide == "gp" and c.config.seed == 1)
    assert gp.config.warm_start in {c.name for c in plan.cells if c.config.seed == 1}
    found = cut.metadata(cut.cells[0])["cut"]
    assert found["epochs"] == {"used": 7, "full": 2000}
    assert found["train_images"] == {"used": 256, "full": None}
    assert "batch_size" not in found
    tiny.write_text(TINY + "epochs_factor = 3")
    epochs = {(c.method, c.config.epochs) for c in read_plan(tiny, epochs=7).cells}
    assert epochs == {("vae", 7), ("gp after vae", 21)}, "a control's factor is kept"


def test_select_takes_what_a_cell_starts_from_along(tiny):
    plan = read_plan(tiny).select(parse_where(["guide=gp", "decoder=fc", "seed=0,2"]))
    found = [(c.config.guide, c.config.decoder, c.config.seed) for c in plan.cells]
    assert found == [("vae", "fc", 0), ("vae", "fc", 2), ("gp", "fc", 0), ("gp", "fc", 2)]
    with pytest.raises(ValueError, match=r"no cell has guide=gq"):
        read_plan(tiny).select({"guide": ["gq"]})
    with pytest.raises(ValueError, match=r"'guid=gp': expected KEY=VALUE"):
        parse_where(["guid=gp"])
    where = parse_where(["guide=sa:4,step_size=0.1,vae"])
    assert where == {"guide": ["sa:4,step_size=0.1", "vae"]}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = 3", "seed = 3", "budget has the unknown name 'seed'"),
        ("epochs = 2", "epochs = 0", "epochs must be at least 1, got 0"),
        ("seeds = 3", "seeds = 0", "budget.seeds must be at least 1, got 0"),
        ("latent_dim", "latent_dims", "grid has the unknown name 'latent_dims'"),
        ("latent_dim = 2", "latent_dim = []", "latent_dim of the method 'vae' is an empty list"),
        ('"conv", "fc"', '"conv", "conv"', "two cells are the same"),
        ('"conv", "fc"', '"cnv"', "decoder must be one of"),
        ('guide = "gp"', 'guide = "pg"', "guide of the method 'gp after vae': unknown guide 'pg'"),
        ('guide = "vae"', 'guide = "vae"\nepochs = 3', r"\[1\] has the unknown name 'epochs'"),
        ('guide = "vae"', 'guide = "vae"\nlearning_rate = [1e-3, 1e-4]', "need names of their own"),
        ('guide = "gp"', 'guide = "sa:1,stepsize=2"', "does not take these options"),
        ('guide = "gp"', 'guide = ["gp", "vae"]', "two cells are the same"),
        ('guide = "gp"', 'guide = "gp"\nepochs_factor = 0', "epochs_factor must be"),
        ('warm_start = "vae"', 'warm_start = "vea"', "'vea': 0 cells of earlier methods"),
        ('guide = "vae"', 'guide = "vae"\ndecoder = "fc"', "0 cells of earlier methods have"),
        ("[budget]", "[budget", "at line"),
    ],
)
def test_a_plan_that_would_fail_or_mislead_is_refused(tiny, old, new, message):
    assert old in TINY
    tiny.write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(tiny)
    assert str(caught.value).startswith(str(tiny)), "the file is named"


def test_finished_runs_that_do_not_fit_are_refused(tiny, tmp_path):
    """Another plan's options under a cell's name, a damaged record: file and field are named."""
    plan = read_plan(tiny, epochs=1, seeds=1)
    cell, out = plan.cells[0], tmp_path / "out"
    train_run(cell.config, out / cell.name, progress=False)
    frame = finished_runs(plan, out)
    assert list(frame["run"]) == [cell.name]
    assert list(frame["method"]) == ["vae"]
    record = out / cell.name / "record.json"
    content = record.read_text()
    record.write_text(content.replace("log_evidence", "log_evidenc"))
    with pytest.raises(ValueError, match=rf"{cell.name}/record.json.*Delete the folder"):
        finished_runs(plan, out)
    write_json(record, read_json(record) | {"config": read_json(record)["config"] | {"epochs": 9}})
    record.write_text(record.read_text().replace('log_evidenc"', 'log_evidence"'))
    with pytest.raises(ValueError, match=r"record.json was trained with epochs = 9, not 1"):
        finished_runs(plan, out)


def test_without_ray_a_sweep_trains_in_turn(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    options = sweep.Options(
        plan=tiny, out=tmp_path / "out", epochs=1, seeds=1, where=("decoder=fc", "seed=0")
    )
    assert sweep.main(replace(options, dry_run=True)) == 0
    assert "2 cells, 0 done. CUT BUDGET: epochs 1 (the paper: 2000), " in capsys.readouterr().out
    assert not (tmp_path / "out").exists(), "nothing is written"
    with pytest.raises(ImportError, match=r"pyro-gpvae\[sweep\].*--in-turn"):
        sweep.main(options)
    before = os.getcwd()
    options.in_turn = True
    assert sweep.main(options) == 0
    assert os.getcwd() == before
    assert "CUT BUDGET" in (tmp_path / "out" / "tiny.md").read_text()
    found = {name: path.stat().st_mtime_ns for name, path in records(tmp_path / "out").items()}
    assert [name.split("-")[3] for name in found] == ["gp", "vae"]
    assert sweep.main(options) == 0
    assert found == {n: p.stat().st_mtime_ns for n, p in records(tmp_path / "out").items()}


def test_a_plan_imports_no_code_unless_it_is_trusted(tiny, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    tiny.write_text(TINY.replace('guide = "gp"', 'guide = "stranger:Guide"'))
    with pytest.raises(ValueError, match=r"stranger:Guide.*--trust-guide"):
        sweep.main(sweep.Options(plan=tiny, out=tmp_path / "out", dry_run=True))
    with pytest.raises(SystemExit, match="imported"):
        read_plan(tiny, trust_guide=True)


@pytest.fixture
def start():
    """Starts the command; nothing is left of it after the test, however that ends."""
    processes = []
    yield lambda *args: processes.append(_start(*args)) or processes[-1]
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def _start(*args):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.Popen(
        [sys.executable, SWEEP, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def records(out):
    """Of finished runs: the record of ``RUN.partial`` is written before the folder is renamed."""
    paths = sorted(out.glob("*/record.json"))
    return {path.parent.name: path for path in paths if path.parent.suffix != ".partial"}


def wait_for(out, number, process, seconds=900):
    end = time.monotonic() + seconds
    while len(records(out)) < number:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"{len(records(out))} of {number} records in time"
        time.sleep(0.02)


def scores(out):
    return {name: read_json(path)["scores"] for name, path in records(out).items()}


@pytest.fixture
def cluster(monkeypatch):
    """Two Ray nodes with one core each."""
    pytest.importorskip("ray", reason="the extra sweep is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # no token in the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # a worker that imports torch on a busy machine takes longer than the 60 s that Ray waits
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "600")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.second = cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_lost_node_and_a_killed_driver_cost_nothing(cluster, start, tiny, tmp_path, monkeypatch):
    """Every cell is recorded once, with the scores of a sweep that nothing disturbs: its cells
    trained one after the other, without checkpoints and without Ray."""
    tiny.write_text(TINY.replace('["conv", "fc"]', '"fc"'))
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    command = ("--plan", tiny, "--address", cluster.address, "--out", out, "--checkpoint-every=2")
    process = start(*command)
    wait_for(out, 1, process)
    cluster.remove_node(cluster.second, allow_graceful=False)
    wait_for(out, 3, process)  # all cells without a warm start, also that of the lost node
    process.kill()
    process.communicate()
    before = {name: path.stat().st_mtime_ns for name, path in records(out).items()}
    assert 3 <= len(before) < 6

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = sweep.Options(plan=tiny, out=out, in_turn=True, checkpoint_every="2")
    assert sweep.main(options) == 0  # also waits for a worker that the driver left behind
    undisturbed.mkdir()
    monkeypatch.chdir(undisturbed)
    for cell in read_plan(tiny).cells:
        train_run(cell.config, cell.name, progress=False)
    torch.set_num_threads(threads)
    assert not list(out.glob("*.partial"))
    after = {name: path.stat().st_mtime_ns for name, path in records(out).items()}
    assert before.items() <= after.items(), "no finished cell is repeated"
    assert scores(out) == scores(undisturbed)
    assert len(scores(out)) == 6
    start_of = {
        p["plan"]["method"]: p.get("warm_start") for p in map(read_json, records(out).values())
    }
    assert start_of["vae"] is None
    assert start_of["gp after vae"]["plan"]["cut"]["epochs"] == {"used": 2, "full": 2000}
