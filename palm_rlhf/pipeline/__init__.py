"""Sample, score, pair: the stages before `palm-rlhf train rebel --pairs`, each from a file to a file."""

from palm_rlhf.pipeline.chat import Template, load_template
from palm_rlhf.pipeline.pairs import PairOptions, choose, split
from palm_rlhf.pipeline.sampling import (
    ModelSampler,
    Response,
    Sampler,
    SamplingOptions,
    VLLMSampler,
    read_prompts,
    sample_rows,
    select,
)
from palm_rlhf.pipeline.scoring import (
    Answer,
    ClassifierScorer,
    RewardModelScorer,
    RuleScorer,
    Scorer,
    scored,
)

__all__ = [
    "Answer",
    "ClassifierScorer",
    "ModelSampler",
    "PairOptions",
    "Response",
    "RewardModelScorer",
    "RuleScorer",
    "Sampler",
    "SamplingOptions",
    "Scorer",
    "Template",
    "VLLMSampler",
    "choose",
    "load_template",
    "read_prompts",
    "sample_rows",
    "scored",
    "select",
    "split",
]
