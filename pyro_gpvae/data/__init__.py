"""Image data sets as uint8 tensors (N, C, H, W), and the conversion of data to batches.

:mod:`~pyro_gpvae.data.images` has :class:`~pyro_gpvae.data.images.ImageData`, ``load_data`` (the
embedded digits, published data sets, and ``.npz`` files of your own) and the split of validation
images. Published data sets are read by torchvision, which is imported only when one of them is
asked for. :mod:`~pyro_gpvae.data.batch` has ``to_batch``, the one conversion of what users pass to
what programs are called with. Every other package may use it; it uses ``core`` only.
"""
