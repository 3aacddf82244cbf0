"""No module of the packages executes what it reads from a file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"}
CALLS |= {"yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "torch.jit.load"}
CALLS |= {"torch.hub.load", "subprocess.getoutput", "subprocess.getstatusoutput"}
OPTIONS = {"allow_pickle": True, "shell": True}
SHORT = {"np": "numpy", "pd": "pandas"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return SHORT.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def dangers(source):
    """What could execute a file's content, as pairs of a line number and a name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute | ast.Name):  # also map(eval, lines), not guide.eval()
            names = [dotted(node)]
        found += [(node.lineno, n) for n in names if n in CALLS or n.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", "?") for k in node.keywords}
            found += [(node.lineno, o) for o in OPTIONS if given.get(o, False) is not False]
            if dotted(node.func) == "torch.load" and given.get("weights_only") is not True:
                found.append((node.lineno, "torch.load"))
    return found


def test_no_module_runs_what_it_reads():
    files = [path for room in ("pyro_gpvae", "guides") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 40
    found = {path: dangers(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "dangerous"),
    [
        ("from pickle import loads", True),
        ("import torch; torch.load(path)", True),
        ("import torch; torch.load(path, weights_only=choice)", True),
        ("map(eval, texts)", True),
        ("from os import system", True),
        ("subprocess.run(text, shell=choice)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("pd.read_pickle(path)", True),
        ("guide.eval(); torch.load(p, weights_only=True); np.load(p)", False),
        ("subprocess.run(['git']); np.load(p, allow_pickle=False); re.compile('a')", False),
    ],
)
def test_the_search_finds_what_it_should(source, dangerous):
    assert bool(dangers(source)) == dangerous
