r"""What every other package uses: programs, plates, errors, seeds and files.

``_programs``
    :class:`Program`, an ``nn.Module`` that Pyro trains without its global parameter store.
``_plates``
    The name of the data plate, which separates local sites from global ones.
``_errors``
    :class:`NonFiniteError`, which names the images, and :class:`UnsupportedError`.
``_seeds``
    Context managers that seed the random generators and restore them.

The other modules are about the operating system: files, signals, memory and versions. This package
imports no other package, and all packages may import it.
"""
