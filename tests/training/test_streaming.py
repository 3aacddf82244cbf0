"""Images that stay on disk: the same training, bit for bit."""

import threading

import numpy as np
import pytest
import torch
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import fit
from pyro_gpvae.core._environment import sha256
from pyro_gpvae.data.images import is_memory_mapped, memory_mapped
from pyro_gpvae.training._streaming import Gathering, stays_on_host

CPU = torch.device("cpu")


def uint8(count):
    return (images(count) * 255).to(torch.uint8)


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "images.npy", uint8(30).numpy())
    return memory_mapped(tmp_path / "images.npy")


def pairs(count):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = linear_model(seed=seed).float()
        found.append((model, GaussianGuide(model, linear_encoder())))
    return found


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gathering")]


def test_a_file_is_a_tensor_whose_slices_know_that_they_are_mapped(mapped):
    assert torch.equal(mapped, uint8(30))
    assert is_memory_mapped(mapped)
    assert is_memory_mapped(mapped[3:5])
    assert not is_memory_mapped(mapped[[3, 5]])
    assert not is_memory_mapped(uint8(3))


def test_writing_to_the_tensor_leaves_the_file_alone(mapped, tmp_path):
    mapped.zero_()
    assert torch.equal(memory_mapped(tmp_path / "images.npy"), uint8(30))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 1, 3, 3), np.float32), "expected uint8 values 0 to 255, got float32"),
        (np.zeros((2, 3, 3), np.uint8), r"expected shape \(B, C, H, W\)"),
        (np.zeros((0, 1, 3, 3), np.uint8), "could not be read|at least one image"),
        (np.zeros((4, 3, 5, 3), np.uint8).T, "Fortran order"),
        (np.array([{}]), "could not be read"),
    ],
    ids=["dtype", "rank", "empty", "order", "objects"],
)
def test_other_files_are_refused(tmp_path, array, words):
    np.save(tmp_path / "other.npy", array)
    with pytest.raises(ValueError, match=words):
        memory_mapped(tmp_path / "other.npy")


def test_damaged_archived_and_missing_files_are_refused(tmp_path):
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text.npy could not be read"):
        memory_mapped(tmp_path / "text.npy")
    np.savez(tmp_path / "many.npz", a=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="is an archive"):
        memory_mapped(tmp_path / "many.npz")
    with pytest.raises(FileNotFoundError, match=r"none.npy"):
        memory_mapped(tmp_path / "none.npy")


def test_a_gpu_holds_images_that_fit_what_torch_keeps_unused(monkeypatch):
    x, gpu = uint8(30), torch.device("cuda")
    for name, share in (("mem_get_info", 0.5), ("memory_reserved", 2.0), ("memory_allocated", 0.4)):
        size = int(share * x.nbytes)
        told = (size, 0) if name == "mem_get_info" else size
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: told)
    assert not stays_on_host(x, gpu)  # 0.5 free and 2 - 0.4 kept: half of it holds them
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: x.nbytes)
    assert stays_on_host(x, gpu)


def test_the_hash_is_that_of_the_pixels(mapped):
    import hashlib

    many = uint8(1).expand(5000, -1, -1, -1)
    for found in (mapped, many):
        assert sha256(found) == hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("seeds", [None, [3, 4]])
def test_training_is_the_same_bit_for_bit(mapped, seeds, tmp_path):
    runs = []
    for data in (uint8(30), mapped):
        programs = pairs(1 if seeds is None else 2)
        models, guides = zip(*programs, strict=True)
        args = programs[0] if seeds is None else (models, guides)
        history = fit(*args, data, epochs=3, batch_size=8, seeds=seeds, progress=False)
        rows = [history] if seeds is None else history
        tables = [h.frame().drop(columns="seconds") for h in rows]
        runs.append((tables, [p for m in (*models, *guides) for p in m.parameters()]))
    assert all(a.equals(b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert not threads()


def test_resumes_in_the_middle_of_an_epoch(mapped, tmp_path):
    from pyro_gpvae.training.checkpoint import Checkpoints

    class Stop(Exception):
        pass

    class Killed(Checkpoints):
        def save(self, state):
            super().save(state)
            if state.step == 6:
                raise Stop

    data = {"straight": uint8(30), "killed": mapped}
    found = {}
    for name, some in data.items():
        (programs,) = pairs(1)
        kept = tmp_path / name
        if name == "killed":
            with pytest.raises(Stop):
                fit(*programs, some, epochs=3, batch_size=8, progress=False,
                    checkpoints=Killed(kept, every=3))  # fmt: skip
            assert not threads()
            (programs,) = pairs(1)
        fit(*programs, some, epochs=3, batch_size=8, progress=False, checkpoints=kept, resume=True)
        found[name] = [p for program in programs for p in program.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_the_next_minibatch_is_gathered_in_another_thread():
    gathered = []

    class Watched:
        def __getitem__(self, index):
            gathered.append((threading.current_thread().name, index.tolist()))
            return index

    with Gathering(Watched(), CPU) as gather:
        first, second, other = (torch.tensor(i) for i in ([1, 2], [3, 4], [5]))
        assert gather(first, second) is first
        assert gather(second, first) is second
        assert gather(other).equal(other)  # not what was announced
    assert ("gathering_0", [3, 4]) in gathered
    assert [index for _, index in gathered].count([3, 4]) == 1
    assert gathered[0] == (threading.current_thread().name, [1, 2])
    assert not threads()


def test_errors_of_the_thread_reach_the_caller():
    class Broken:
        def __getitem__(self, index):
            if threading.current_thread() is threading.main_thread():
                return index
            raise OSError("the disk is gone")

    index = torch.arange(3)
    with Gathering(Broken(), CPU) as gather:
        gather(index, index)
        with pytest.raises(OSError, match="the disk is gone"):
            gather(index)
    assert not threads()
