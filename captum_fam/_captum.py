"""Captum's private helpers, imported here and nowhere else in the package."""

from captum._utils.common import _reduce_list as reduce_list
from captum._utils.common import _run_forward as run_forward
from captum._utils.common import _sort_key_list as sort_key_list
from captum._utils.gradient import _extract_device_ids as extract_device_ids
from captum._utils.typing import TargetType

__all__ = [
    "TargetType",
    "extract_device_ids",
    "reduce_list",
    "run_forward",
    "sort_key_list",
]
