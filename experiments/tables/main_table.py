"""Convolutional decoders on MNIST, OMNIGLOT, SVHN and CelebA, p = 10, 20, 50.

    python experiments/tables/main_table.py runs/mnist runs/omniglot runs/svhn runs/celeba

These are the results of the main paper that its supplement refers to. Published scores are those
that the supplement repeats in its Table 5; the others are not given there. The folders hold runs
of ``pyro-gpvae train`` and evaluations of ``pyro-gpvae evaluate RUN --companion N --out FOLDER``.
Writes main_table and main_table_companion as Markdown, LaTeX, CSV and PNG.
"""

import tyro
from _records import Column, Table
from _tables import Options, main
from table4 import GUIDES

TABLE = Table(
    "main_table",
    "MNIST, OMNIGLOT, SVHN and CelebA, convolutional decoders",
    {
        name: tuple(Column(data, p) for p in (10, 20, 50))
        for name, data in (
            ("MNIST", "mnist"),
            ("OMNIGLOT", "omniglot"),
            ("SVHN", "svhn"),
            ("CelebA", "celeba"),
        )
    },
    GUIDES,
)

if __name__ == "__main__":
    main(TABLE, tyro.cli(Options, description=__doc__))
