"""Training-free trimming of image features in cross-attention vision-language models."""

__version__ = "0.1.0"
