"""Whether a map has the sign of the margin that it explains, such as score - threshold, and if not, why."""

from captum_fam.engine.question import Less
from captum_fam.engine.report import Report
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.fame import Fame
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.feature_factorization_activation_map import FeatureFactorizationActivationMap
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.methods.relax import Relax
from captum_fam.methods.similarity_attribution import SimilarityAttribution
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition

# The score that a place brings less the mean; changes; strengths.
ADD_UP_TO_NOTHING = (Relax, Fame, FeatureFactorizationActivationMap)
ROUNDING = 1e-4  # as a share of the largest score; a smaller value has no sign


def are_opposite(kind: type[SimilarityAttribution], mean: float, margin: float, score: float) -> bool:
    """Whether the mean of a map and its margin have opposite signs; ``score`` is the largest of those compared."""
    if issubclass(kind, ADD_UP_TO_NOTHING):
        return False
    return mean * margin < 0 and min(abs(mean), abs(margin)) > ROUNDING * score


def why_opposite(kind: type[SimilarityAttribution], similarity: str | None) -> str:
    if issubclass(kind, CorrespondenceMap):
        return "it shows which places look alike, not what the score is made of"
    if issubclass(kind, IntegratedDecomposition):
        return "it adds up to what the image has beyond a baseline, the mean of its own places"
    if issubclass(kind, SimilarityDecomposition) and similarity == "euclidean":
        return "a part of a distance belongs to the references alone"
    if issubclass(kind, FeatureActivationMap):
        return "FAM's places do not add up to the margin; see --method SimilarityDecomposition"
    return "its places do not add up to the margin"


def texts_of(report: Report, less: Less | str) -> list[str]:
    """What to tell of maps. Less the own share, they should add up to zero: the warning about their sum is left out."""
    own = isinstance(less, str) and less == "self"
    return [text for text in report.texts() if not (own and text.startswith("The places of layer"))]
