r"""Room: core."""
