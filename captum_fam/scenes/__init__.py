"""Scenes that share one object: a benchmark of explanations of similarity, with known ground truth."""

from captum_fam.scenes._removal import removal_effects
from captum_fam.scenes._shared_objects import Scenes, shared_object_scenes

__all__ = ["Scenes", "removal_effects", "shared_object_scenes"]
