"""The code is laid out as CONTRIBUTING.md draws it."""

import ast
import re
from pathlib import Path

import captum_fam

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "captum_fam"


def levels():
    """Of each module, or package, its level in the drawing, from the top."""
    (drawing,) = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    return {
        name: level
        for level, rows in enumerate(drawing.split("   |\n"))
        for name in re.findall(r"(\w+)(?:\.py|/)(?=\s)", rows)
    }


def modules():
    """Each module's own name in the drawing, and its file."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, file


def imported(file):
    """The modules of the package that a file imports, wherever in it and however."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("captum_fam."))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: imports are absolute"
            if node.module == "captum_fam":
                homes = [getattr(getattr(captum_fam, alias.name), "__module__", None) for alias in node.names]
                yield from (h.split(".")[1] if h else alias.name for h, alias in zip(homes, node.names))
            elif (node.module or "").startswith("captum_fam."):
                yield node.module.split(".")[1]


def test_the_drawing_has_every_module_and_no_other():
    assert set(levels()) == {name for name, _ in modules()}


def test_modules_import_from_their_own_level_and_below():
    level = levels()
    pairs = [(name, other) for name, file in modules() for other in imported(file) if other in level]
    upwards = [(name, other) for name, other in pairs if level[other] < level[name]]
    assert len(pairs) > 100
    assert not upwards
