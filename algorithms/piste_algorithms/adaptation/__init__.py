"""Test-time adaptation of prompts, and streams that are adapted only after a shift was found."""

from piste_algorithms.adaptation.adapter import StepInfo
from piste_algorithms.adaptation.adaptive_stream import AdaptiveStream
from piste_algorithms.adaptation.fisher_prompt import FisherPrompt
from piste_algorithms.adaptation.gradient_prompt import EntropyMatching, GradientPrompt, Tent
from piste_algorithms.adaptation.prompts import (
    AdditivePrompt,
    NormalizationPrompt,
    RewrittenPrompt,
    TokenPrompt,
)

__all__ = [
    "AdaptiveStream",
    "AdditivePrompt",
    "EntropyMatching",
    "FisherPrompt",
    "GradientPrompt",
    "NormalizationPrompt",
    "RewrittenPrompt",
    "StepInfo",
    "Tent",
    "TokenPrompt",
]
