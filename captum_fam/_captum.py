"""Captum's private helpers, imported here and nowhere else in the package."""

from captum._utils.common import _reduce_list as reduce_list
from captum._utils.common import _run_forward as run_forward
from captum._utils.common import _sort_key_list as sort_key_list
from captum._utils.gradient import _extract_device_ids as extract_device_ids
from captum._utils.typing import TargetType
from captum.attr._core.lrp import SUPPORTED_LAYERS_WITH_RULES, SUPPORTED_NON_LINEAR_LAYERS
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import EpsilonRule, IdentityRule

__all__ = [
    "SUPPORTED_LAYERS_WITH_RULES",
    "SUPPORTED_NON_LINEAR_LAYERS",
    "Addition_Module",
    "EpsilonRule",
    "IdentityRule",
    "TargetType",
    "extract_device_ids",
    "reduce_list",
    "run_forward",
    "sort_key_list",
]
