"""Table 4: every method on CIFAR10, convolutional decoders, p = 10, 20, 50.

    python experiments/tables/table4.py runs/cifar10 --out docs/results

The folders hold runs of ``pyro-gpvae train`` and evaluations of ``pyro-gpvae evaluate RUN
--companion N --out FOLDER``. Writes table4 and table4_companion as Markdown, LaTeX, CSV and PNG.
"""

import tyro
from _records import Column, Table
from _tables import Options, main

GUIDES = (
    "vae", "sa:1", "sa:2", "sa:4", "sa:8", "iaf:1", "iaf:2", "iaf:4", "iaf:8", "hf:1", "hf:2",
    "hf:4", "hf:8", "me:2", "me:3", "me:4", "me:5", "rme:2", "rme:3", "rme:4", "rme:5", "gp",
)  # fmt: skip
TABLE = Table(
    "table4",
    "Table 4: CIFAR10",
    {"convolutional decoders": tuple(Column("cifar10", p) for p in (10, 20, 50))},
    GUIDES,
)

if __name__ == "__main__":
    main(TABLE, tyro.cli(Options, description=__doc__))
