r"""The command ``pyro-gpvae``: a dataclass of options with ``run()`` for each subcommand.

A command parses options, calls the library, and prints. The modules import nothing heavy (no
torch, pandas or matplotlib) before a command runs, so that ``--help`` is fast. No other package
imports this one.
"""
