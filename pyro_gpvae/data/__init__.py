"""Image data sets as uint8 tensors (N, C, H, W), and their conversion to floats.

:mod:`~pyro_gpvae.data.images` has :class:`~pyro_gpvae.data.images.ImageData`, ``load_data`` (the
embedded digits, published data sets, and ``.npz`` files of your own), the split of validation
images, and ``to_batch``, the one conversion of images in the library. Published data sets are read
by torchvision, which is imported only when one of them is asked for. Every other room may use this
room; it uses ``core`` only.
"""
