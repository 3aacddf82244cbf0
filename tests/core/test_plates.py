"""Finding the data plate of a program."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_gpvae.core._plates import find_data_plate

x = torch.zeros(5, 2)


def program(*plates, observed=None, latent=0, **options):
    """A program with plates (name, size) at dimension -1: a latent site in one, x in another."""

    def run(x):
        for index, (name, size) in enumerate(plates):
            with pyro.plate(name, size, dim=-1, **options):
                if index == latent:
                    pyro.sample("u", dist.Normal(0.0, 1.0))
                elif index != observed:
                    pyro.sample(f"other{index}", dist.Normal(0.0, 1.0))
                if index == (latent if observed is None else observed):
                    pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x[:size])

    return run


@pytest.mark.parametrize("size", [5, None])
@pytest.mark.parametrize("name", ["data", "batch"])
def test_the_name_is_free_and_the_size_may_be_missing(name, size):
    assert find_data_plate(program((name, size)), (x,)) == name
    assert find_data_plate(program(("weights", 3), (name, size), latent=1), (x,)) == name


def test_of_two_plates_of_the_size_of_the_batch_the_one_called_data_is_meant():
    assert find_data_plate(program(("weights", 5), ("data", 5), latent=1), (x,)) == "data"
    with pytest.raises(ValueError, match=r"\['weights', 'batch'\] at dimension -1 .*'data'"):
        find_data_plate(program(("weights", 5), ("batch", 5), latent=1), (x,))


def test_a_nested_plate_is_not_the_data_plate():
    def nested(x):
        with pyro.plate("batch", len(x), dim=-1), pyro.plate("parts", len(x), dim=-2):
            pyro.sample("u", dist.Normal(0.0, 1.0))

    assert find_data_plate(nested, (x,)) == "batch"


@pytest.mark.parametrize("outer", ["data", "batch"])
def test_a_data_plate_at_another_dimension_is_refused(outer):
    """If the members have as many parts, the plate of the parts would be taken for it."""

    def nested(x):
        with pyro.plate(outer, 5, dim=-2), pyro.plate("parts", 5, dim=-1):
            pyro.sample("u", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=rf"plate\('{outer}'\) .* dimension -2: .* dim=-1"):
        find_data_plate(nested, (x,))


def test_a_plate_of_particles_around_the_data_plate_may_have_any_size():
    def nested(x):
        with pyro.plate("particles", 5, dim=-2), pyro.plate("data", 5, dim=-1):
            pyro.sample("u", dist.Normal(0.0, 1.0))

    assert find_data_plate(nested, (x,)) == "data"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (program(("weights", 3)), "no plate at dimension -1 can hold the 5 members"),
        (program(("other", 3), ("data", 5), observed=1), "no latent site lies in plate"),
        (program(("data", 5), ("other", 1), observed=1), "observed site 'x' lies in plate"),
        (program(("data", 50), subsample_size=5), r"write plate\('data', len\(x\)\)"),
    ],
)
def test_programs_that_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        find_data_plate(wrong, (x,))


def test_the_look_ahead_changes_no_program_around_it():
    with pyro.poutine.trace() as outer:
        find_data_plate(program(("data", 5)), (x,))
    assert not [node for node in outer.trace.nodes if node in ("u", "x")]
