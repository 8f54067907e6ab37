"""Feature Activation Map and its companions: explanations of similarity scores, for Captum users."""

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from captum_fam import _interrupt  # noqa: F401  # first: Ctrl-C may come while torch is imported

__version__ = "0.2.0"

if TYPE_CHECKING:
    from captum_fam._public import *  # noqa: F403
    from captum_fam._public import __all__ as __all__
else:

    def __getattr__(name):
        """
        Imports the public names when the first of them is used, and a module when it is used. So
        the command's help does not wait for torch.
        """
        if name == "__all__" or not name.startswith("__"):
            if find_spec(f"{__name__}.{name}"):
                return importlib.import_module(f"{__name__}.{name}")
            public = importlib.import_module(f"{__name__}._public")
            for each in ("__all__", *public.__all__):
                globals().setdefault(each, getattr(public, each))
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
