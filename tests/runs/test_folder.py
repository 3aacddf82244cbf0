"""A run folder that is damaged, of another version, or not trusted is refused by name."""

import pytest
import torch
from safetensors.torch import load, save_file

from guides import GaussianGuide, GPGuide
from pyro_gpvae import ImageModel, evaluate_run, load_run, resume_run, train_run
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.runs.weights import load_weights, save_weights


def test_weights_survive_the_round_trip(tmp_path):
    model = ImageModel((1, 8, 8), 2)
    guide = GPGuide(model)
    save_weights(tmp_path / "w.safetensors", model, guide)
    expected = {k: v.clone() for k, v in (model.state_dict() | guide.state_dict()).items()}
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(1)
    load_weights(tmp_path / "w.safetensors", model, guide)
    found = model.state_dict() | guide.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_that_cannot_be_used(tmp_path):
    model = ImageModel((1, 8, 8), 2)
    guide = GaussianGuide(model)
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no weights file .*w\.safetensors"):
        load_weights(path, model, guide)
    with pytest.raises(ValueError, match="the guide is a function, expected"):
        save_weights(path, model, lambda x: None)
    assert not path.exists()

    digest = save_weights(path, model, guide)
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x80\x04pickle"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read the weights in .*w\.safetensors"):
            load_weights(path, model, guide)
        with pytest.raises(ValueError, match=r"w\.safetensors is not the file that was written"):
            load_weights(path, model, guide, digest)
    weights = load(whole)
    sigma, layer = weights["model.log_sigma"], next(n for n in weights if n.startswith("guide"))
    for changed, message in (
        ({"model.log_sigma": torch.zeros(3)}, r"do not fit .*guide\..* is missing.* more"),
        (
            weights | {layer: weights[layer].int()},
            rf"{layer} is torch.int32, expected torch.float32",
        ),
        (weights | {"model.log_sigma": sigma - torch.inf}, r"model.log_sigma in .* is not finite"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_weights(path, model, guide)
    path.write_bytes(whole)
    bigger = ImageModel((1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"has shape \(.*\), expected \("):
        load_weights(path, bigger, GaussianGuide(bigger))
    assert all(torch.equal(guide.state_dict()[name], before[name]) for name in before)


def test_damaged_run_folders(folder, vae, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        load_run(tmp_path / "nowhere")
    config = read_json(folder / "config.json")
    for changes, message in (
        ({"flavour": "sweet"}, r"config\.json has the unknown option 'flavour'"),
        ({"epochs": "three"}, r"config\.json: epochs must be int, got 'three'"),
        ({"latent_dim": 3}, r"record.json and config.json differ: latent_dim is 2 and 3"),
        (
            {"latent_dim": 2**63},
            "latent_dim must be at most 100,000, got 9,223,372,036,854,775,808",
        ),
    ):
        write_json(folder / "config.json", config | changes)
        with pytest.raises(ValueError, match=message):
            load_run(folder)
    write_json(folder / "config.json", config)
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"weights\.safetensors is not the file that was written"):
        load_run(folder)
    data = vae[1]["data"]
    for change in (
        {"scores": {}},
        {"config": 1},
        {"data": {"image_shape": 1}},
        {"data": data | {"train_images": "64"}},
        {"data": data | {"image_shape": [1, 28]}},
        {"warm_start": "a run"},
        {"warm_start": {"config": {"epochs": "many"}}},
    ):
        write_json(folder / "record.json", vae[1] | change)
        with pytest.raises(ValueError, match=r"record\.json is not the record of a run"):
            load_run(folder)
    (folder / "record.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"record\.json"):
        load_run(folder)


def test_a_run_of_a_newer_version_is_refused(folder, vae):
    write_json(folder / "record.json", vae[1] | {"format": 2})
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1: upgrade"):
        load_run(folder)


def test_a_file_imports_no_code_unless_it_is_trusted(folder, vae, tiny, tmp_path, monkeypatch):
    """A stranger's run folder names a module that lies beside it."""
    canary = tmp_path / "canary"
    (tmp_path / "evil_guides.py").write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nGuide = print"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = read_json(folder / "config.json")
    config["guide"] = "evil_guides:Guide"
    write_json(folder / "config.json", config)
    write_json(folder / "record.json", vae[1] | {"config": config})
    partial = tmp_path / "other.partial"
    partial.mkdir()
    write_json(partial / "config.json", config)
    for call in (
        lambda: load_run(folder),
        lambda: evaluate_run(folder, guide="vae"),
        lambda: train_run(tiny(guide="vae", warm_start=str(folder)), tmp_path / "new"),
        lambda: resume_run(tmp_path / "other"),
    ):
        with pytest.raises(ValueError, match=r"not registered.*trust_guide"):
            call()
        assert not canary.exists()
    with pytest.raises(AttributeError):  # print makes no guide; but now it is imported
        load_run(folder, trust_guide=True)
    assert canary.exists()
