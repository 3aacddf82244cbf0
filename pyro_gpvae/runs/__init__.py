r"""Room: runs."""
