"""Table 5: fully-connected against convolutional decoders, MNIST and OMNIGLOT, p = 10, 50.

    python experiments/tables/table5.py runs/mnist runs/omniglot --out docs/results

The folders hold runs of ``pyro-gpvae train`` and evaluations of ``pyro-gpvae evaluate RUN
--companion N --out FOLDER``. Writes table5 and table5_companion as Markdown, LaTeX, CSV and PNG.
The paper has VLAE for fully-connected decoders only; here it has convolutional ones as well.
"""

import tyro
from _records import Column, Table
from _tables import Options, main

GUIDES = (
    "vae", "sa:1", "sa:2", "sa:4", "sa:8", "vlae:1", "vlae:2", "vlae:4", "vlae:8", "gp",
)  # fmt: skip
TABLE = Table(
    "table5",
    "Table 5: fully-connected and convolutional decoders",
    {
        name: tuple(Column(data, p, decoder) for data in ("mnist", "omniglot") for p in (10, 50))
        for name, decoder in (
            ("fully-connected decoders", "fc"),
            ("convolutional decoders", "conv"),
        )
    },
    GUIDES,
)

if __name__ == "__main__":
    main(TABLE, tyro.cli(Options, description=__doc__))
