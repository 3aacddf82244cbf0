"""The campaigns with small budgets: kills, mutated records, hostile data files and folders."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hostile_folder
import pytest

CAMPAIGNS = Path(hostile_folder.__file__).parent


def campaign(name, tmp_path, *options):
    """Runs a campaign in a process of its own, which forks; returns how often what happened."""
    done = subprocess.run(
        [sys.executable, str(CAMPAIGNS / f"{name}.py"), *options, f"--out={tmp_path}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken." in done.stdout
    return json.loads((tmp_path / f"{name}.json").read_text())["counts"]


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    counts = campaign("crash_campaign", tmp_path, "--kills=6", "--guides=gp", "--train-images=128")
    assert counts.pop("gp: identical") > 0
    assert sum(counts.values()) == 6


@pytest.mark.slow
def test_mutated_records_are_refused_or_told(tmp_path):
    counts = campaign("mutated_records", tmp_path, "--attempts=20")
    assert sum(counts.values()) == 20


@pytest.mark.slow
def test_hostile_data_files_are_refused(tmp_path):
    counts = campaign("hostile_data", tmp_path, "--attempts=40")
    assert sum(counts.values()) == 40
    assert sum(count for name, count in counts.items() if name.endswith("refused")) > 20


def test_every_promise_names_its_test():
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) > 40
    assert [row for row in rows if not re.search(r"\| (`test_\w+`(, )?)+ \|$", row)] == []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "run"
    hostile_folder.make_hostile(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    ["help", "guides", *(pytest.param(n, marks=pytest.mark.slow) for n in ("generate", "gap"))],
)
def test_nothing_of_the_folder_runs(name, hostile, tmp_path):
    assert hostile_folder.attack(hostile, name, tmp_path) == ""


@pytest.mark.slow
def test_a_guide_that_the_folder_registers_is_not_loaded(hostile, tmp_path):
    config, record = hostile / "config.json", hostile / "record.json"
    before = config.read_text(), record.read_text()
    try:
        evil = json.loads(before[0]) | {"guide": "evil"}
        config.write_text(json.dumps(evil))
        record.write_text(json.dumps(json.loads(before[1]) | {"config": evil}))
        status, output, errors = hostile_folder.call_inside(hostile, ["evaluate", "."], tmp_path)
        assert status == 2
        assert "'evil', which is not registered" in errors
        assert "HOSTILE" not in output
        # the test would see code that runs
        own = ["train", "--guide=evil:Guide", f"--out={tmp_path / 'own'}"]
        assert "HOSTILE" in hostile_folder.call_inside(hostile, own, tmp_path)[1]
    finally:
        config.write_text(before[0])
        record.write_text(before[1])
