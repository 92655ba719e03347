"""Model folders to running models: configuration, one table of architectures, loader, decoder."""

from cupyq.models.config import ModelConfig, Quantization
from cupyq.models.loader import load_model
from cupyq.models.model import Model

__all__ = ["Model", "ModelConfig", "Quantization", "load_model"]
