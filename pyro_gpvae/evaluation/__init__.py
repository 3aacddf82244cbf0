r"""Room: evaluation."""
