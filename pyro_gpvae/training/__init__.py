r"""Room: training."""
