"""From logits to text: sampler settings, the generation loop, streaming text, perplexity."""

from cupyq.generate.generator import Result, generate
from cupyq.generate.perplexity import Perplexity, perplexity
from cupyq.generate.text import StreamDecoder, encode, load_tokenizer
from cupyq.models.sampler import SamplerSettings

__all__ = [
    "Perplexity",
    "Result",
    "SamplerSettings",
    "StreamDecoder",
    "encode",
    "generate",
    "load_tokenizer",
    "perplexity",
]
