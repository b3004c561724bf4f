"""Fine-tune CLIP on your own image-text pairs."""

__version__ = "0.1.0"
