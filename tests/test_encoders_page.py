"""The blocks of the page on encoders run, in their order, in a folder with small models."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run  # noqa: F401
from test_encoders import clip, picture, save_dual, save_open_clip, save_sentence_transformer, timm

PAGE = (Path(__file__).parent.parent / "docs" / "encoders.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|console)\n(.*?)^```$", PAGE, re.M | re.S)
MINE = """
import torch
from torch import nn

class MyEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, images):
        return self.conv(images).relu().mean((2, 3))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name in ("clip-folder", "open-clip-folder", "sentence-folder"):
        (folder / name).mkdir()
    save_dual(folder / "clip-folder", clip)
    save_open_clip(folder / "open-clip-folder", "ViT")
    save_sentence_transformer(folder / "sentence-folder", "CLIP")
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "test_vit.pt")
    (folder / "my_module.py").write_text(MINE)
    picture(60, 40).save(folder / "query.jpg")
    picture(40, 60).save(folder / "match.jpg")
    return folder


def test_the_blocks_run(run, monkeypatch, folder):  # noqa: F811
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    names = {}
    exec("from my_module import MyEncoder", names)
    for kind, block in BLOCKS:
        if kind == "python":
            names.pop("maps", None)
            exec(block, names)
            assert "maps" not in names or (names["maps"].shape[:2] == (1, 1) and names["maps"].any())
        else:
            command, *arguments = shlex.split(block.removeprefix("$ "))
            assert command == "captum-fam"
            status, _, err = run(*arguments)
            assert (status, err) == (0, "")
    sys.modules.pop("my_module")


def test_each_kind_of_encoder_is_there_on_the_shell_and_in_python():
    for name in ("bundled", "timm:", "hf:", "open_clip:", "sentence-transformers:"):
        assert {kind for kind, block in BLOCKS if name in block} == {"python", "console"}
    assert len(BLOCKS) == 12
