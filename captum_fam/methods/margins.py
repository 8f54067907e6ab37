"""Maps and the margins that they are to explain, score - threshold for one: whether their signs agree, and why not."""

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
ROUNDING = 1e-4  # of the largest score: what is less has no sign


def are_opposite(kind: type[SimilarityAttribution], mean: float, margin: float, score: float) -> bool:
    """Whether a map adds up to the other sign than its margin; ``score`` is the largest of those compared."""
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
    """What is to be told of maps; of those less the own share not that they do not add up, as nothing is left to."""
    own = isinstance(less, str) and less == "self"
    return [text for text in report.texts() if not (own and text.startswith("The places of layer"))]
