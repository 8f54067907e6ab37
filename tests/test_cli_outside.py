"""What the command meets outside: names, files that are none, warnings of Pillow, and Ctrl-C at any moment."""

# ruff: noqa: F811  # fixtures of other tests

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import warnings
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli import is_png, photos, run  # noqa: F401

import captum_fam
from captum_fam import demo
from captum_fam._files import irregular, printable, recorded_warnings, utf8
from captum_fam.cli import _common, _explain
from captum_fam.encoders import load_encoder
from captum_fam.images import check_output, read_image

RED = "\x1b[31mred\x07\u202e"
posix = pytest.mark.skipif(os.name != "posix", reason="names and files of POSIX")


@pytest.fixture
def cat(tmp_path):
    """Writes a photograph under a name, and gives its path."""

    def cat(name):
        path = tmp_path / name
        demo.photographs()["cat"].convert("RGB").resize((64, 64)).save(path)
        return path

    return cat


def obeyed(text):
    """What a terminal would not show but obey."""
    return [c for c in text.replace("\n", "") if not c.isprintable()]


# Names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo é 猫.png", "photo é 猫.png"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("two\nlines\tand\x7f\x9b", r"two\nlines\tand\x7f\x9b"),
        ("from \u202eright", r"from \u202eright"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))  # surrogates, too
def test_any_text_can_be_shown_and_written(text):
    assert printable(text).isprintable()
    printable(text).encode("utf-8")
    assert json.loads(json.dumps(utf8(text))).encode("utf-8").decode() == utf8(text)


@posix
@pytest.mark.parametrize("command", ["explain", "compare"])
def test_a_name_with_escape_sequences_does_not_reach_the_terminal(run, cat, tmp_path, command):
    method = ("--method", "FeatureActivationMap") if command == "compare" else ()
    query, reference = cat(f"{RED}.png"), cat(f"{RED}2.png")
    status, out, err = run(command, query, reference, *method)
    assert (status, err) == (0, "")
    assert not obeyed(out)
    assert r"\x1b[31mred" in out
    (figure,) = tmp_path.glob("*_fam.png" if command == "explain" else "*_compare.png")
    assert is_png(figure)


MISTAKES = {
    "a query": ["{tmp}/nope\x1b[2J.png", "{cat}"],
    "an option": ["{cat}", "{cat}", "--\x1b[2J"],
    "an encoder": ["{cat}", "{cat}", "--encoder", "\x1b[2J"],
    "a module": ["{cat}", "{cat}", "--encoder", "\x1b[2J:make"],
    "a layer": ["{cat}", "{cat}", "--layer", "\x1b[2J"],
    "a device": ["{cat}", "{cat}", "--device", "\x1b[2J"],
    "weights": ["{cat}", "{cat}", "--weights", "\x1b[2J"],
    "an output": ["{cat}", "{cat}", "-o", "\x1b[2J"],
    "a contrast": ["{cat}", "{cat}", "{cat}", "--contrast", "\x1b[2J"],
    "an error of the encoder": ["{cat}", "{cat}", "--encoder", "loud_outside:failing"],
    "keys of weights": ["{cat}", "{cat}", "--weights", "{tmp}/keys.pt"],
}
LOUD = """
import warnings
from torch import nn

class Failing(nn.Module):
    def forward(self, x): raise KeyError("\\x1b[2Jpixels")

class Warning_(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 8, 8)
    def forward(self, x):
        warnings.warn("\\x1b[2Jdoubtful")
        return self.features(x).mean((2, 3))

class Leaving(nn.Module):
    def forward(self, x): raise SystemExit(0)

failing, warning, leaving = Failing, Warning_, Leaving
"""


@pytest.fixture
def loud(tmp_path, monkeypatch):
    (tmp_path / "loud_outside.py").write_text(LOUD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "loud_outside", raising=False)


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_an_error_does_not_reach_the_terminal_raw(run, cat, tmp_path, loud, arguments):
    torch.save({"\x1b[2J": torch.zeros(1)}, tmp_path / "keys.pt")
    names = {"tmp": tmp_path, "cat": cat("cat.png")}
    status, out, err = run("explain", *(a.format(**names) for a in arguments))
    assert (status, out) == (2, "")
    assert not obeyed(err)
    assert "[2J" in err


def test_a_warning_does_not_reach_the_terminal_raw(run, cat, loud):
    path = cat("cat.png")
    status, _, err = run("explain", path, path, "--encoder", "loud_outside:warning", "--size", 32)
    assert status == 0
    assert r"captum-fam: warning: \x1b[2Jdoubtful" in err
    assert not obeyed(err)


def test_an_encoder_that_exits_is_an_error(run, cat, loud):
    path = cat("cat.png")
    status, out, err = run("explain", path, path, "--encoder", "loud_outside:leaving")
    assert (status, out) == (2, "")
    assert "SystemExit" in err


@posix
@pytest.mark.parametrize("command", ["explain", "compare"])
def test_a_name_that_is_no_utf8_is_explained(run, tmp_path, cat, command):
    folder = tmp_path / os.fsdecode(b"\xfe")
    folder.mkdir()
    paths = [cat(folder / os.fsdecode(b"\xff$%d.png" % i)) for i in range(2)]
    method = ("--method", "FeatureActivationMap") if command == "compare" else ("--json",)
    status, out, err = run(command, *paths, *method)
    assert (status, err) == (0, "")
    if command == "explain":
        report = json.loads(out)
        json.dumps(report, ensure_ascii=False).encode("utf-8")
        assert report["query"] == f"{tmp_path}/\\udcfe/\\udcff$0.png"
        assert report["figure"].endswith("/\\udcfe/\\udcff$0_fam.png")
        status, out, err = run(command, *paths)
    assert (status, err) == (0, "")
    assert r"\udcff" in out
    assert len([p for p in folder.iterdir() if is_png(p)]) == 3


@pytest.mark.parametrize("command", ["explain", "compare"])
def test_a_name_between_dollars_is_no_formula(run, cat, tmp_path, command):
    method = ("--method", "FeatureActivationMap") if command == "compare" else ()
    path = cat("$x^$.png")
    assert run(command, path, path, *method)[0] == 0
    assert len(list(tmp_path.glob("$x^$_*"))) == 1


def test_a_stream_that_cannot_show_a_name_gets_an_escape(monkeypatch):
    stream = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    _common.say("wrote 猫.png")
    assert stream.buffer.getvalue() == b"wrote \\u732b.png\n"


# Files that are none


@pytest.fixture
def others(tmp_path, monkeypatch):
    """What is no file, by name."""
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    os.mkfifo("pipe.png")
    Path("folder.png").mkdir()
    Path("link.png").symlink_to("pipe.png")
    Path("device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        yield {kind: tmp_path / f"{kind.split()[-1]}.png" for kind in OTHERS}


OTHERS = ["a pipe", "a folder", "a socket", "a device", "a pipe, by a link"]


@posix
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_refused_at_once(run, cat, others, kind):
    path = cat("cat.png")
    what = kind.partition(",")[0]
    for arguments in ([others[kind], path], [path, others[kind]], [path, path, "--weights", others[kind]]):
        status, out, err = run("explain", *arguments)
        assert (status, out) == (2, "")
        assert f"cannot read {others[kind]} as" in err
        assert f"it is {what}" in err
        assert err.count("\n") == 1
    with pytest.raises(ValueError, match=r"cannot write .*-o"):
        check_output(others[kind], ".png", [path])


@posix
def test_a_link_to_a_file_is_a_file_and_a_loop_is_none(cat, tmp_path):
    (tmp_path / "link.png").symlink_to(cat("cat.png"))
    assert read_image(tmp_path / "link.png").size == (64, 64)
    assert not irregular(tmp_path / "link.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(ValueError, match=r"loop\.png"):
        read_image(tmp_path / "loop.png")


@posix
def test_a_pipe_in_a_folder_of_transformers_is_refused_at_once(tmp_path):
    pytest.importorskip("transformers")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is a pipe"):
        load_encoder(f"hf:{tmp_path}")


# What Pillow says


def damaged(path):
    """A photograph whose Exif ends too early: Pillow warns, and reads it."""
    Image.new("RGB", (20, 10), "red").save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    return path


def test_a_warning_of_pillow_names_its_file_once(run, cat, tmp_path):
    first, second = damaged(tmp_path / "first.jpg"), damaged(tmp_path / "second.jpg")
    status, _, err = run("explain", first, second, first, cat("whole.png"))
    assert status == 0
    lines = err.splitlines()
    assert [line.rpartition(" (")[2] for line in lines] == [f"{first})", f"{second})"]
    assert all(line.startswith("captum-fam: warning: Corrupt EXIF data") for line in lines)


def test_a_warning_of_a_large_image_names_it(run, cat, monkeypatch):
    path = cat("large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    status, _, err = run("explain", path, path)
    assert status == 0
    assert err.count("\n") == 1
    assert "decompression bomb" in err
    assert err.endswith(f"({path})\n")


def test_what_pillow_logs_of_a_broken_file_is_said_by_the_error_alone(run, cat, tmp_path, caplog):
    content = bytearray(MEMORY["TIFF"])
    place = content.index(struct.pack("<HHI", 277, 3, 1))  # the samples of a pixel
    content[place + 8 : place + 10] = struct.pack("<H", 4355)
    (tmp_path / "samples.tiff").write_bytes(content)
    level = logging.getLogger("PIL").level
    status, _, err = run("explain", cat("cat.png"), tmp_path / "samples.tiff")
    assert status == 2
    assert err.startswith("captum-fam: cannot read")
    assert err.count("\n") == 1
    assert not [record for record in caplog.records if record.name.startswith("PIL")]
    assert logging.getLogger("PIL").level == level


def test_a_warning_after_an_image_is_about_no_file(cat):
    path = cat("cat.png")
    with recorded_warnings() as found:
        read_image(path)
        warnings.warn("doubtful", stacklevel=1)
        warnings.warn("of numbers", RuntimeWarning, stacklevel=1)
    assert list(found) == [("doubtful", "")]


def test_a_user_s_filter_of_warnings_counts(tmp_path):
    path = damaged(tmp_path / "photo.jpg")
    for filter_, count in (("default", 1), ("ignore", 0)):
        with warnings.catch_warnings():
            warnings.simplefilter(filter_)
            with recorded_warnings() as found:
                read_image(path)
                read_image(path)
        assert len(found) == count


def whole(kind):
    stream = BytesIO()
    photo = demo.photographs()["cat"].convert("RGB").resize((24, 16))
    photo.save(stream, kind, **({"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"} if kind == "JPEG" else {}))
    return stream.getvalue()


KINDS = ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "PCX", "TGA", "SGI"]
MEMORY = {kind: whole(kind) for kind in KINDS}


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(KINDS), st.data())
def test_whatever_bytes_a_file_holds_it_is_an_image_or_an_error_that_names_it(tmp_path_factory, kind, data):
    content = bytearray(MEMORY[kind])
    changes = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8)
    for place, byte in data.draw(changes):
        content[place] = byte
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=16))
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(content)
    try:
        found = read_image(path).mode
    except ValueError as error:
        found = str(error)
    assert found == "RGB" or str(path) in found


@pytest.mark.parametrize("kind", [MemoryError, RecursionError, KeyError, AssertionError])
def test_whatever_pillow_raises_is_an_error_that_names_the_file(cat, monkeypatch, kind):
    def fail(*_):
        raise kind

    path = cat("cat.png")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.raises(ValueError, match=r"cat\.png as an image"):
        read_image(path)


# Ctrl-C

WAITING_TORCH = """
import pathlib, signal
pathlib.Path("at_work").touch()
while not pathlib.Path("go").exists():
    signal.sigtimedwait([], 0.05) if hasattr(signal, "sigtimedwait") else None
raise ImportError("no torch here")
"""
SCRIPT = "import sys\nfrom captum_fam.cli import main\nsys.exit(main())\n"  # as pip writes it
SWALLOWING_TORCH = "try:\n" + "".join(f"    {line}\n" for line in WAITING_TORCH.splitlines()) + "except: pass\n"


def begin(folder, *command, ignored=False):
    """Starts a program in a folder, with interrupts as they are in a terminal, or ignored, as under nohup."""
    handler = "SIG_IGN" if ignored else "SIG_DFL"
    code = f"import os, signal; signal.signal(2, signal.{handler}); os.execv({command[0]!r}, {[*command]!r})"
    return subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{Path(captum_fam.__file__).parents[1]}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reached(file):
    from test_batch import until

    return until(file.exists, pause=0.01)


@pytest.fixture
def command(tmp_path):
    (tmp_path / "captum-fam").write_text(SCRIPT)
    return {
        "module": [sys.executable, "-m", "captum_fam"],
        "script": [sys.executable, str(tmp_path / "captum-fam")],
    }


@posix
@pytest.mark.parametrize("way", ["module", "script"])
@pytest.mark.parametrize("torch", [WAITING_TORCH, SWALLOWING_TORCH], ids=["", "swallowed"])
def test_an_interrupt_of_the_import_of_torch_is_one_line(tmp_path, command, way, torch):
    (tmp_path / "torch.py").write_text(torch)
    process = begin(tmp_path, *command[way], "explain", "a.png", "b.png")
    assert reached(tmp_path / "at_work")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "captum-fam: interrupted\n")
    assert process.returncode == 130


@posix
def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path, command):
    (tmp_path / "torch.py").write_text(WAITING_TORCH)
    process = begin(tmp_path, *command["module"], "explain", "a.png", "b.png", ignored=True)
    assert reached(tmp_path / "at_work")
    process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    assert process.communicate(timeout=60) == ("", "captum-fam: ImportError: no torch here\n")
    assert process.returncode == 2


@posix
def test_a_second_interrupt_waits_for_nothing(tmp_path, command, cat):
    cat("cat.png")
    (tmp_path / "hanging.py").write_text(
        "import pathlib, signal\n"
        "def make():\n"
        "    try:\n        pathlib.Path('at_work').touch()\n        signal.pause()\n"
        "    finally:\n        pathlib.Path('cleaning').touch()\n        signal.pause()\n"
    )
    process = begin(tmp_path, *command["script"], "explain", "cat.png", "cat.png", "--encoder", "hanging:make")
    assert reached(tmp_path / "at_work")
    process.send_signal(signal.SIGINT)
    assert reached(tmp_path / "cleaning")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "captum-fam: interrupted\n")
    assert process.returncode == 130


def test_an_interrupt_during_the_work_is_one_line_and_the_handler_is_put_back(run, cat, monkeypatch):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    path = cat("cat.png")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may run where it is ignored
    try:
        monkeypatch.setattr(_explain, "read_image", interrupted)
        status, out, err = run("explain", path, path)
        assert (status, out, err.strip()) == (130, "", "captum-fam: interrupted")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@posix
def test_a_program_that_imports_the_package_keeps_its_interrupts(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")  # it would take seconds
    (tmp_path / "program.py").write_text(
        "import signal\n"
        "try:\n    import captum_fam\nexcept ImportError:\n    pass\n"
        "assert signal.getsignal(2) is signal.default_int_handler\n"
    )
    for command in (["program.py"], ["-m", "program"], ["program.py", "-m", "captum_fam"]):
        process = begin(tmp_path, sys.executable, *command)
        assert process.communicate(timeout=60) == ("", "")


def test_the_help_says_that_a_factory_is_code_that_is_run(run):
    for command in ("explain", "compare", "batch"):
        out = " ".join(run(command, "--help")[1].split())
        assert "code is run, and a module in the current folder comes first" in out
