"""Scenes that share one object: a benchmark for explanations of similarity, whose answer is known."""

from captum_fam.scenes._removal import removal_effects
from captum_fam.scenes._shared_objects import Scenes, shared_object_scenes

__all__ = ["Scenes", "removal_effects", "shared_object_scenes"]
