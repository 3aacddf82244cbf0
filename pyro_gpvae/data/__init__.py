r"""Room: data."""
