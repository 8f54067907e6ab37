"""Feature Activation Map and its companions: explanations of similarity scores, for Captum users."""

from captum_fam.adapters import explanation_func, to_input_space
from captum_fam.feature_activation_map import FeatureActivationMap
from captum_fam.score import SimilarityScore, prototypes
from captum_fam.similarity import channel_contributions, contribution_weights

__all__ = [
    "FeatureActivationMap",
    "SimilarityScore",
    "channel_contributions",
    "contribution_weights",
    "explanation_func",
    "prototypes",
    "to_input_space",
]
