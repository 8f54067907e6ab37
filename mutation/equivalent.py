"""Mutants that make no difference which a test could see, and why."""

# module, what was there, what came instead: why
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "engine/places",
        "rounding = max(_ROUNDING.get(z.dtype, 0), _ROUNDING.get(A.dtype, 0))",
        "rounding = max(_ROUNDING.get(z.dtype, 1), _ROUNDING.get(A.dtype, 0))",
    ): "z has one of the four dtypes: of no other can torch take a norm",
    (
        "engine/places",
        "if 0 < n_references <= min(f.shape[2], max(N)):",
        "if 0 is not n_references <= min(f.shape[2], max(N)):",
    ): "a number of references is not negative",
    (
        "engine/path",
        'if self.baseline == "zero":',
        'if self.baseline >= "zero":',
    ): 'the other name is "mean", which comes before "zero"',
    ("methods/channel_attribution", "@abstractmethod", ""): "a mark for mypy: no class of Captum's is an ABC",
    (
        "methods/layer_attribution",
        "deltas = [missed[:, 0] for missed in found.missed]",
        "deltas = [missed[:, -1] for missed in found.missed]",
    ): "`attribute` explains one pair for each input, (B, 1)",
}
