"""The public names: ``captum_fam`` has them from here."""

from captum_fam.adapters import explanation_func, to_input_space
from captum_fam.comparison import compare_attributions
from captum_fam.encoders import LoadedEncoder, load_encoder
from captum_fam.explorer import PairExplorer, explore_pair
from captum_fam.matches import visualize_matches
from captum_fam.methods.class_activation_map import ClassActivationMap
from captum_fam.methods.correspondence_map import CorrespondenceMap
from captum_fam.methods.fame import Fame
from captum_fam.methods.feature_activation_map import FeatureActivationMap
from captum_fam.methods.feature_factorization_activation_map import FeatureFactorizationActivationMap
from captum_fam.methods.integrated_decomposition import IntegratedDecomposition
from captum_fam.methods.label_free_activation_map import LabelFreeActivationMap
from captum_fam.methods.relax import Relax
from captum_fam.methods.relevance_cam import RelevanceCam
from captum_fam.methods.score_cam import ScoreCam
from captum_fam.methods.shared_parts import SharedParts, SharedPartsExplanation
from captum_fam.methods.similarity_decomposition import SimilarityDecomposition
from captum_fam.score import SimilarityScore, prototypes
from captum_fam.similarity import channel_contributions, contribution_weights
from captum_fam.tasks.contrastive import NearestReferences, nearest_references
from captum_fam.tasks.episode_explanation import EpisodeExplanation
from captum_fam.tasks.few_shot import explain_episode
from captum_fam.tasks.hits import Hits, explain_hits
from captum_fam.tasks.late_interaction import MaxSimExplanation, explain_maxsim
from captum_fam.tasks.place_vectors import place_vectors, store_places
from captum_fam.tasks.retrieval import explain_retrieval
from captum_fam.tasks.retrieval_explanation import RetrievalExplanation
from captum_fam.tasks.stored_places import PlaceMatches, match_places
from captum_fam.tasks.verification import explain_verification
from captum_fam.tasks.verification_explanation import VerificationExplanation
from captum_fam.tokens import channels_last, patch_tokens
from captum_fam.visualization import visualize_comparison, visualize_pair, visualize_parts

__all__ = [
    "ClassActivationMap",
    "CorrespondenceMap",
    "EpisodeExplanation",
    "Fame",
    "FeatureActivationMap",
    "FeatureFactorizationActivationMap",
    "Hits",
    "IntegratedDecomposition",
    "LabelFreeActivationMap",
    "LoadedEncoder",
    "MaxSimExplanation",
    "NearestReferences",
    "PairExplorer",
    "PlaceMatches",
    "Relax",
    "RelevanceCam",
    "RetrievalExplanation",
    "ScoreCam",
    "SharedParts",
    "SharedPartsExplanation",
    "SimilarityDecomposition",
    "SimilarityScore",
    "VerificationExplanation",
    "channel_contributions",
    "channels_last",
    "compare_attributions",
    "contribution_weights",
    "explain_episode",
    "explain_hits",
    "explain_maxsim",
    "explain_retrieval",
    "explain_verification",
    "explanation_func",
    "explore_pair",
    "load_encoder",
    "match_places",
    "nearest_references",
    "patch_tokens",
    "place_vectors",
    "prototypes",
    "store_places",
    "to_input_space",
    "visualize_comparison",
    "visualize_matches",
    "visualize_pair",
    "visualize_parts",
]
