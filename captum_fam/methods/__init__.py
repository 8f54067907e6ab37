# The methods that compare_attributions compares by default.
DEFAULT = (
    "FeatureActivationMap",
    "SimilarityDecomposition",
    "IntegratedDecomposition",
    "LabelFreeActivationMap",
    "LayerGradCam",
    "RelevanceCam",
    "Relax",
)
