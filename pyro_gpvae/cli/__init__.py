r"""Room: cli."""
