"""Metrics for attribution maps of similarity scores: can this map be trusted?"""

from captum_fam.metrics._faithfulness import (
    PerturbationCurve,
    average_drop,
    average_increase,
    deletion,
    insertion,
)
from captum_fam.metrics._localisation import (
    box_masks,
    energy_pointing_game,
    iou,
    pointing_game,
    relevance_rank_accuracy,
)
from captum_fam.metrics._pairs import matching_accuracy, pair_deletion, pair_insertion, pair_pointing_game
from captum_fam.metrics._road import Road, road
from captum_fam.metrics._sanity import (
    Randomization,
    ReferenceDependence,
    cascading_randomization,
    rank_correlation,
    reference_dependence,
)

__all__ = [
    "PerturbationCurve",
    "Randomization",
    "ReferenceDependence",
    "Road",
    "average_drop",
    "average_increase",
    "box_masks",
    "cascading_randomization",
    "deletion",
    "energy_pointing_game",
    "insertion",
    "iou",
    "matching_accuracy",
    "pair_deletion",
    "pair_insertion",
    "pair_pointing_game",
    "pointing_game",
    "rank_correlation",
    "reference_dependence",
    "relevance_rank_accuracy",
    "road",
]
