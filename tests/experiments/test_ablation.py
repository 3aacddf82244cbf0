"""The table of the options: its budget and its seeds are those of the rows."""

import ablation


def row(method, seed=0, epochs=8, score=100.0):
    return {
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "train_images": 4096,
        "validation_images": 256,
        "num_samples": 100,
        "log_evidence": score,
        "elbo": score - 5,
        "sigma": 0.25,
    }


def test_a_control_is_not_the_budget():
    """A control may be first in the alphabet."""
    text = ablation.table([row("VAE x2", epochs=16), row("vae")])
    assert "Budget cut: 8 epochs" in text
    assert "| VAE x2 | 100.0 (1 seed) | 95.0 (1 seed) | +0.0 (1 seed) | 0.250 | 16 |" in text


def test_seeds_are_those_of_each_method():
    rows = [row("gp", seed, score=110.0 + seed) for seed in range(3)]
    rows += [row("sa:2"), *(row("vae", seed) for seed in range(3))]
    text = ablation.table(rows)
    assert "| gp | 111.0 ± 1.0 | 106.0 ± 1.0 | +11.0 ± 1.0 |" in text
    assert "| sa:2 | 100.0 (1 seed) |" in text
    assert "over 1 to 3 seeds;" in text
    assert "over 3 seeds;" in ablation.table([r for r in rows if r["method"] != "sa:2"])
    assert "over 1 seed;" in ablation.table([row("vae")])
    alone = ablation.table([row("gp", seed=0), row("vae", seed=1)])
    assert "| gp | 100.0 (1 seed) | 95.0 (1 seed) | – |" in alone
