"""Guides come from installed distributions, and the working directory is searched for none."""

import sys

import pytest

from pyro_gpvae.core import _registry
from pyro_gpvae.model.guide import load_guide


def test_a_name_that_two_distributions_register_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, guide in (("first", "gp"), ("second", "mine"), ("third", "mine")):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[pyro_gpvae.guides]\n{guide} = {name}_module:G\n")
    with pytest.raises(ValueError, match="distributions first and pyro-gpvae both register the g"):
        load_guide("gp")
    with pytest.raises(ValueError, match=r"second and third both .* 'second_module:G' or 'third_m"):
        load_guide("mine")
    assert load_guide("vae").__name__ == "GaussianGuide", "other names are not affected"
    monkeypatch.chdir(tmp_path)
    assert "mine" not in _registry.registered_guides(), "nothing is looked up where one works"


def test_the_working_directory_is_on_the_path_for_one_import_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named_guide.py").write_text("import sys\npath = list(sys.path)\nG = print\n")
    (tmp_path / "broken_guide.py").write_text("raise RuntimeError('broken')\n")
    before = list(sys.path)
    assert load_guide("named_guide:G") is print
    assert sys.modules["named_guide"].path == [*before, str(tmp_path)]
    with pytest.raises(ValueError, match="RuntimeError: broken"):
        load_guide("broken_guide:G")
    assert sys.path == before
