r"""Room: model."""
