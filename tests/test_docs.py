"""The code of README and tutorials runs, in order, with a cut budget."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what is cut so that each page runs in seconds: pattern and replacement
CUTS = [
    (r"epochs=\d+", "epochs=1"),
    (r"num_samples=100", "num_samples=5"),
    (r'load_data\("mnist5k"\)', 'load_data("mnist5k").take(train=256, test=32)'),
    (r"data\.test\[:20\]", "data.test[:2]"),
]


@pytest.mark.parametrize("page", ["README.md", "docs/your_own_guide.md"])
def test_the_code_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_guides", raising=False)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    (tmp_path / "my_guides.py").write_text(blocks[0])  # as the reader is told to save it
    namespace: dict = {"__name__": "__page__"}
    for number, block in enumerate(blocks):
        for pattern, replacement in CUTS:
            block = re.sub(pattern, replacement, block)
        exec(compile(block, f"{page}, block {number + 1}", "exec"), namespace)
    assert capsys.readouterr().out


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^python -m pip install -c constraints.txt .*$", readme, re.M)
    assert len(commands) == 2
    for command in commands:
        assert command.replace(" demo", " demo --quick --out") in ci or command in ci
