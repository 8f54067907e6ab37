# What compare_attributions compares where no method is named.
DEFAULT = (
    "FeatureActivationMap",
    "SimilarityDecomposition",
    "IntegratedDecomposition",
    "LabelFreeActivationMap",
    "LayerGradCam",
    "RelevanceCam",
    "Relax",
)
