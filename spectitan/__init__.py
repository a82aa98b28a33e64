"""spectitan trains draft models for lossless speculative decoding, natively on PyTorch."""

__version__ = "0.1.0"
