"""Many texts at a time: jobs that come and go in one running batch, over one paged cache that they share."""

from cupyq.models.sampler import SamplerSettings
from cupyq.serve.generator import Generator
from cupyq.serve.job import Event, Job, TokenLogprobs
from cupyq.serve.speculation import ModelDraft, NGramDraft

__all__ = ["Event", "Generator", "Job", "ModelDraft", "NGramDraft", "SamplerSettings", "TokenLogprobs"]
