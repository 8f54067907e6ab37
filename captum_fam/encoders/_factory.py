"""Encoders of the user's own modules."""

import importlib
import sys
from pathlib import Path

from torch import nn

from captum_fam.encoders._loading import near, one_line


def from_factory(module_name: str, factory_name: str) -> nn.Module:
    sys.path.insert(0, "")  # modules of the current folder, as with python -m
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        dotted = ".".join(Path(module_name).with_suffix("").parts)
        hint = f"; write {dotted}:{factory_name}" if module_name.endswith(".py") else ""
        raise ValueError(f"cannot import {module_name}: {one_line(error)}{hint}") from error
    finally:
        sys.path.remove("")
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        close = near(factory_name, [n for n in dir(module) if callable(getattr(module, n))])
        raise ValueError(f"{module_name} has no function {factory_name!r}{close}")
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{module_name}:{factory_name}() failed: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module_name}:{factory_name}() returned {type(model).__name__}: return a torch.nn.Module")
    return model
