"""The batch job: what its rows say, what an error costs, and that it ends the same however often it is killed."""

import csv
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import HeadEncoder, PooledEncoder, seeded
from encoders import random as normal
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_errors import Counted

from captum_fam import FeatureActivationMap, cli, demo
from captum_fam.bundled import bundled_encoder
from captum_fam.encoders._ready import ReadyEncoder
from captum_fam.images import read_image, to_tensor

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _engines, _part, _work  # noqa: E402
from captum_fam.batch._work import QUERY, Explaining, Work  # noqa: E402

NAMES = ["astronaut.jpg", "cat.jpg", "coffee.jpg", "rocket.jpg", "sub/motorcycle.png"]
PAIRS = [(query, reference) for query in NAMES for reference in NAMES]
PROJECT = Path(batch.__file__).parents[2]
CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may run where it is ignored, as under nohup
from captum_fam.cli import main
main()
"""
COMMAND = [sys.executable, "-c", CODE, "batch"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT), "RAY_USAGE_STATS_ENABLED": "0"}
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    (folder / "folder.jpg").mkdir()
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    for name in NAMES:
        demo.photographs()[Path(name).stem].convert("RGB").resize((96, 80)).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / NAMES[0]).read_bytes()[:900])
    return folder


def one_by_one(photos, size=None):
    """Scores and maps of PAIRS, one call for each."""
    encoder = bundled_encoder()
    images = {n: to_tensor(read_image(photos / n), size or encoder.size, encoder.mean, encoder.std) for n in NAMES}
    fam = FeatureActivationMap(encoder, encoder.features)
    found = {}
    for q, r in PAIRS:
        query, reference = images[q][None], images[r][None]
        score = torch.cosine_similarity(fam.embed(query), fam.embed(reference)).item()
        found[q, r] = score, fam.attribute(query, reference=reference)[0, 0].numpy()
    return found


@pytest.fixture(scope="session")
def expected(photos):
    return one_by_one(photos)


@pytest.fixture
def in_process(monkeypatch):
    """Without worker processes: each of those takes seconds to start."""

    def engine(left, options, workers, parts):
        explain = _part.PartExplainer(**pickle.loads(pickle.dumps(options)), threads=1)
        for part in left:
            yield explain(part)

    monkeypatch.setitem(_engines.ENGINES, "local", engine)


@pytest.fixture
def run(monkeypatch, capsys, in_process):
    """Runs captum-fam batch in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["captum-fam", "batch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return run


def write(file, pairs, ids=None):
    """The pairs as a CSV or Parquet file."""
    columns = {"id": ids} if ids is not None else {}
    columns |= {"query": [q for q, _ in pairs], "reference": [r for _, r in pairs]}
    if file.suffix == ".parquet":
        pq.write_table(pa.table(columns), file)
    else:
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([list(columns), *zip(*columns.values())])
    return file


def read(folder):
    return pq.read_table(folder).to_pylist()  # a folder as any reader of Parquet takes it


def the_map(row):
    return np.array(row["map"], np.float64).reshape(row["shape"]) * row["scale"]


def check(rows, pairs, expected):
    assert [(row["query"], row["reference"]) for row in rows] == pairs
    for row in rows:
        score, values = expected[row["query"], row["reference"]]
        assert row["error"] is None
        assert row["score"] == pytest.approx(score, abs=1e-5)
        np.testing.assert_allclose(the_map(row), values, rtol=2**-10, atol=2**-10)


# What the rows say


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_each_row_is_what_attribute_gives_for_its_pair(photos, tmp_path, expected, in_process, suffix, batch_size):
    pairs = write(tmp_path / f"pairs{suffix}", PAIRS)
    found = batch.explain_pairs(pairs, tmp_path / "out", root=photos, part_size=10, batch_size=batch_size)
    rows = read(tmp_path / "out")
    check(rows, PAIRS, expected)
    assert [row["id"] for row in rows] == list(range(25))
    assert found == batch.BatchResult(25, 0, None, "features", {})
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "out").glob("*.parquet"))] == [10, 10, 5]


@pytest.mark.parametrize(
    ("suffix", "ids", "kept"),
    [
        (".csv", ["007", "b", ""], ["007", "b", None]),
        (".parquet", [7, None, -1], [7, None, -1]),
        (".parquet", pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (".parquet", [{"user": 1}, {"user": 2}, {"user": 3}], [{"user": 1}, {"user": 2}, {"user": 3}]),
    ],
    ids=["text", "numbers", "categories", "structs"],
)
def test_the_id_is_the_file_s_own(photos, tmp_path, in_process, suffix, ids, kept):
    pairs = write(tmp_path / f"pairs{suffix}", PAIRS[:3], ids)
    batch.explain_pairs(pairs, tmp_path / "out", root=photos, part_size=2)
    assert [row["id"] for row in read(tmp_path / "out")] == kept


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_paths_are_text_of_any_kind_and_row_groups_of_any_size(photos, tmp_path, expected, in_process, kind):
    columns = {name: pa.array([p[i] for p in PAIRS]).cast(kind) for i, name in enumerate(("query", "reference"))}
    pq.write_table(pa.table(columns | {"rank": [1] * 25}), tmp_path / "pairs.parquet", row_group_size=4)
    batch.explain_pairs(tmp_path / "pairs.parquet", tmp_path / "out", root=photos, part_size=7)
    check(read(tmp_path / "out"), PAIRS, expected)


def test_relative_paths_start_at_the_root_and_absolute_ones_do_not(photos, tmp_path, expected, run, monkeypatch):
    monkeypatch.chdir(photos / "sub")
    pairs = write(tmp_path / "pairs.csv", [("../cat.jpg", str(photos / "cat.jpg"))])
    status, out, err = run(pairs, "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "explained 1 pairs, 0 failed\n" in out
    assert read(tmp_path / "out")[0]["score"] == pytest.approx(1)


def test_an_image_is_read_once_in_neighbouring_batches(photos, tmp_path, in_process, monkeypatch):
    paths = []
    monkeypatch.setattr(_part, "read_image", lambda path: paths.append(path) or read_image(path))
    pairs = write(tmp_path / "pairs.csv", [(NAMES[0], name) for name in NAMES] * 2)
    batch.explain_pairs(pairs, tmp_path / "out", root=photos, batch_size=5)
    assert sorted(paths) == sorted(photos / name for name in NAMES)


# What an error costs


@pytest.mark.parametrize("kind", [PooledEncoder, HeadEncoder])
def test_a_query_of_several_pairs_takes_one_pass(kind):
    encoder = Counted(seeded(kind))
    fam = FeatureActivationMap(encoder, encoder.layer)
    queries, s = normal(3, 3, 8, 8), normal(4, encoder(normal(1, 3, 8, 8)).shape[1], seed=2)
    query_of, reference_of = torch.tensor([2, 0, 2, 1, 2, 0]), torch.tensor([3, 1, 0, 1, 3, 2])
    expected = fam.attribute(queries[query_of], reference_of, reference_embedding=s)
    z = fam.embed(queries)
    encoder.calls = 0
    ready = ReadyEncoder(encoder, 8, device="cpu")
    explaining = Explaining(ready, "layer", fam, None, batch_size=32, running=nullcontext)
    work = Work(explaining, ([f"q{q}" for q in query_of], reference_of.tolist()), dict(enumerate(s)))
    (step,) = work.steps([QUERY], stored=True)
    step.run({f"q{q}": x for q, x in enumerate(queries)})
    assert encoder.calls == 1
    for n, values in enumerate(expected[:, 0].numpy()):
        found, scale = work.maps[QUERY][n]
        np.testing.assert_allclose(found.astype(np.float64) * scale, values, rtol=0, atol=2**-10 * np.abs(values).max())
        assert work.scores[n] == pytest.approx(torch.cosine_similarity(z[query_of[n]], s[reference_of[n]], 0).item())


def test_what_cannot_be_read_costs_its_own_rows_only(photos, tmp_path, expected, run):
    bad = {
        ("nope.jpg", NAMES[0]): "there is no image",
        (NAMES[0], "broken.jpg"): "as an image",
        ("cut.jpg", NAMES[1]): "as an image",
        (NAMES[1], "folder.jpg"): "as an image",
        (None, NAMES[0]): "'query'",
        (NAMES[0], None): "'reference'",
        (NAMES[0], "nul\0.jpg"): "nul",
    }
    mixed = [pair for pairs in zip(PAIRS, [*bad, *bad]) for pair in pairs]
    pairs = write(tmp_path / "pairs.parquet", mixed)
    status, out, err = run(pairs, "-o", tmp_path / "out", "--root", photos, "--part-size", 9, "--batch-size", 4)
    rows = read(tmp_path / "out")
    check(rows[::2], PAIRS[:14], expected)
    for row in rows[1::2]:
        assert bad[row["query"], row["reference"]] in row["error"]
        assert "\n" not in row["error"]
        assert row["score"] is row["map"] is row["shape"] is row["scale"] is None
    assert (status, err) == (1, "")
    kinds = "8 cannot be read, 4 no path, 2 no such file"
    assert f"explained 14 pairs, 14 failed ({kinds}); the first: there is no image {photos}/nope.jpg" in out


def test_if_no_pair_can_be_explained_the_command_fails_with_the_first_error(photos, tmp_path, run):
    pairs = write(tmp_path / "pairs.csv", PAIRS[:3])
    (tmp_path / "elsewhere").mkdir()
    status, out, err = run(pairs, "-o", tmp_path / "out", "--root", tmp_path / "elsewhere")
    assert (status, out) == (2, "")
    assert f"none of 3 pairs could be explained (3 no such file), see {tmp_path / 'out'}; the first: there" in err
    assert "elsewhere/astronaut.jpg" in err
    assert err.count("\n") == 1


FACTORIES = '''
import os
import threading
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.features = factor, nn.Conv2d(3, 4, 8, 8)
    def forward(self, x):
        return self.features(x).mul(self.factor).mean((2, 3))

class Layer(nn.Module):
    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU())
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(factor)
    def forward(self, x):
        z = self.features(x).mean((2, 3))
        dark, bright = x.mean((1, 2, 3)) < -1.5, x.mean((1, 2, 3)) > 1.5
        return torch.where(dark[:, None], torch.zeros_like(z), torch.where(bright[:, None], z / 0, z))

def plain(): return Layer(1.0)
def large(): return Layer(1e9)
def small(): return Layer(1e-6)
def double(): return Layer(1e20).double()

class Around(Layer):
    def __init__(self):
        super().__init__(1.0)
        self.side = nn.Conv2d(3, 4, 8, 8)
    def forward(self, x):
        self.side(x)
        print("forward")
        return super().forward(x)

def around(): return Around()

class Failing(nn.Module):
    def forward(self, x): raise KeyError("pixels")

def failing(): return Failing()

class Waiting(Layer):
    """At a bright image, for ever."""
    def forward(self, x):
        if x.mean() > 1.5:
            open(f"at_work-{os.getpid()}", "w").close()
            threading.Event().wait()
        return super().forward(x)

def waiting(): return Waiting(1.0)
'''


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "batch_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "batch_factories", raising=False)
    return tmp_path


@pytest.mark.parametrize("encoder", ["plain", "large", "small", "double"])
def test_maps_that_do_not_fit_float16_come_with_a_scale(photos, factories, in_process, encoder):
    pairs = write(factories / "pairs.csv", PAIRS)
    batch.explain_pairs(pairs, factories / "out", root=photos, encoder=f"batch_factories:{encoder}", size=64)
    sys.path.insert(0, str(factories))
    try:
        import batch_factories
    finally:
        sys.path.pop(0)
    model = getattr(batch_factories, encoder)().eval()
    fam = FeatureActivationMap(model, model.features[1])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    dtype = next(model.parameters()).dtype
    scales = set()
    for row in read(factories / "out"):
        query, reference = (
            to_tensor(read_image(photos / row[n]), 64, mean, std)[None].to(dtype) for n in ("query", "reference")
        )
        values = fam.attribute(query, reference=reference)[0, 0].double().numpy()
        largest = np.abs(values).max()
        np.testing.assert_allclose(the_map(row), values, rtol=0, atol=2**-10 * largest)
        assert row["scale"] == 1 or 1 <= largest / row["scale"] <= 2
        scales.add(row["scale"])
    assert (scales == {1.0}) == (encoder == "plain")


@given(st.floats(-(2.0**127), 2.0**127, width=32), st.floats(0, 1, width=32))
def test_float16_keeps_eleven_bits_of_the_largest_value(largest, share):
    values = np.array([[largest, largest * share, 0]], np.float32)
    half, scale = _work.half(values)
    assert half.dtype == np.float16
    assert np.isfinite(half).all()
    assert np.log2(scale) % 1 == 0
    assert (scale == 1) == (largest == 0 or 2**-3 <= abs(largest) <= 2**15 or 1 <= abs(largest) < 2)
    np.testing.assert_allclose(half.astype(np.float64) * scale, values, rtol=2**-11, atol=abs(largest) * 2**-11)


def test_an_embedding_that_is_zero_or_not_finite_is_an_error_of_its_rows_and_no_warning(
    photos, factories, run, recwarn
):
    for name, colour in {"dark": 0, "bright": 255}.items():
        Image.new("RGB", (8, 8), (colour,) * 3).save(photos / f"{name}.png")
    mixed = [*PAIRS[:6], *[(b, NAMES[0]) for b in ("dark.png", "bright.png")], *[(NAMES[1], "dark.png")], *PAIRS[6:8]]
    pairs = write(factories / "pairs.csv", mixed)
    status, _, err = run(
        *(pairs, "-o", factories / "out", "--root", photos, "--encoder", "batch_factories:plain", "--size", 64)
    )
    rows = read(factories / "out")
    assert (status, err) == (1, "")
    assert {row["failure"] for row in rows} == {None, "no similarity"}
    assert ["zero or not finite" in (row["error"] or "") for row in rows] == [False] * 6 + [True] * 3 + [False] * 2
    alone = write(factories / "alone.csv", [*PAIRS[:6], *PAIRS[6:8]])
    run(alone, "-o", factories / "alone", "--root", photos, "--encoder", "batch_factories:plain", "--size", 64)
    for row, other in zip([*rows[:6], *rows[9:]], read(factories / "alone")):
        assert row["score"] == pytest.approx(other["score"], rel=1e-5)
        np.testing.assert_allclose(row["map"], other["map"], rtol=2**-10, atol=2**-10)


def test_what_is_doubtful_is_said_once_and_what_an_encoder_prints_is_no_result(photos, factories, run):
    pairs = write(factories / "pairs.csv", PAIRS)
    status, out, err = run(
        *(pairs, "-o", factories / "out", "--root", photos, "--encoder", "batch_factories:around", "--layer", "side"),
        *("--size", 64, "--part-size", 6),
    )
    assert status == 0
    assert "forward" not in out
    assert err.replace("forward\n", "").count("\n") == 1
    assert "does not depend on layer" in err


BAD = {
    "no such file": (["{tmp}/nope.csv"], "there is no file"),
    "a folder without images": (["{tmp}"], "a pair needs two images, but {tmp} has none"),
    "another suffix": (["{tmp}/pairs.txt"], ".parquet or .csv"),
    "no Parquet": (["{tmp}/text.parquet"], "text.parquet"),
    "an empty CSV": (["{tmp}/empty.csv"], "empty.csv"),
    "no rows": (["{tmp}/header.csv"], "no pairs"),
    "no column query": (["{tmp}/queries.csv"], "rename 'queries'"),
    "no column reference": (["{tmp}/other.csv"], "its columns are query, hit"),
    "two columns query": (["{tmp}/twice.csv"], "one column 'query'"),
    "paths that are no text": (["{tmp}/numbers.parquet"], "int64"),
    "no such root": (["{pairs}", "--root", "{tmp}/nope"], "--root"),
    "no such weights": (["{pairs}", "--weights", "{tmp}/nope.pt"], "nope.pt"),
    "an unknown encoder": (["{pairs}", "--encoder", "bundle"], "did you mean bundled?"),
    "an unknown layer": (["{pairs}", "--layer", "feature"], "features"),
    "a layer without a map": (["{pairs}", "--encoder", "batch_factories:plain", "--layer", "nope"], "nope"),
    "an encoder that fails": (["{pairs}", "--encoder", "batch_factories:failing"], "--batch-size"),
    "an unknown device": (["{pairs}", "--device", "gpu"], "gpu"),
    "a standard deviation of zero": (["{pairs}", "--std", "0", "1", "1"], "--std"),
    "a part of no pairs": (["{pairs}", "--part-size", "0"], "--part-size"),
    "an output that is a file": (["{pairs}", "-o", "{pairs}"], "-o"),
    "an output that holds something else": (["{pairs}", "-o", "{photos}"], "not empty"),
}


@pytest.mark.parametrize(("arguments", "advice"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line_that_says_what_to_do(run, photos, factories, arguments, advice):
    for name, content in {
        "pairs.txt": "query,reference\n",
        "text.parquet": "text",
        "empty.csv": "",
        "header.csv": "query,reference\n",
        "queries.csv": "queries,reference\na,b\n",
        "other.csv": "query,hit\na,b\n",
        "twice.csv": "query,reference,query\na,b,c\n",
    }.items():
        (factories / name).write_text(content)
    pq.write_table(pa.table({"query": [1], "reference": ["a"]}), factories / "numbers.parquet")
    pairs = write(factories / "pairs.csv", PAIRS[:2])
    names = {"tmp": factories, "pairs": pairs, "photos": photos}
    status, out, err = run("-o", factories / "out", "--root", photos, *(a.format(**names) for a in arguments))
    assert (status, out) == (2, "")
    assert advice.format(**names) in err
    assert err.count("\n") == 1
    assert not list(factories.glob("out/*.parquet"))
    assert not list(factories.glob("out/_tmp*"))


@pytest.mark.parametrize(("module", "extra"), [("pyarrow", "batch"), ("ray", "ray")])
def test_a_library_that_is_missing_is_named_with_its_extra(photos, tmp_path, run, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "pyarrow":
        monkeypatch.delitem(sys.modules, "captum_fam.batch")
    pairs = write(tmp_path / "pairs.csv", PAIRS[:2])
    engine = ("--engine", "ray") if module == "ray" else ()
    status, _, err = run(pairs, "-o", tmp_path / "out", "--root", photos, *engine)
    assert status == 2
    assert f"pip install 'captum-fam[{extra}]'" in err
    assert err.count("\n") == 1


# Started again


def stamps(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.parquet")}


def test_what_is_finished_is_kept_and_what_is_missing_is_made(photos, tmp_path, run):
    arguments = (write(tmp_path / "pairs.csv", PAIRS), "-o", tmp_path / "out", "--root", photos, "--part-size", 4)
    run(*arguments)
    before, content = stamps(tmp_path / "out"), (tmp_path / "out" / "part-000003.parquet").read_bytes()
    (tmp_path / "out" / "part-000003.parquet").unlink()
    (tmp_path / "out" / f"_tmp-1-{'0a' * 16}").write_text("left by a run that was killed")
    status, out, _ = run(*arguments)
    after = stamps(tmp_path / "out")
    assert status == 0
    assert "explained 25 pairs, 0 failed" in out
    assert {name for name in before if before[name] != after[name]} == {"part-000003.parquet"}
    assert (tmp_path / "out" / "part-000003.parquet").read_bytes() == content
    assert not list((tmp_path / "out").glob("_tmp*"))
    run(*arguments, "--workers", 1, "--batch-size", 3)  # these make no other job
    assert stamps(tmp_path / "out") == after


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--layer", "features.0"), "layer (None then)"),
        (("--similarity", "dot"), "similarity ('cosine' then)"),
        (("--size", 64), "size"),
        (("--part-size", 4), "part_size (5 then)"),
        (("--root", "."), "root"),
        (("--weights", "weights.pt"), "weights"),
        ((), "pairs"),
    ],
)
def test_another_job_in_the_same_folder_is_an_error_that_names_the_difference(
    photos, tmp_path, run, monkeypatch, changed, named
):
    monkeypatch.chdir(tmp_path)
    torch.save(bundled_encoder().state_dict(), "weights.pt")
    arguments = ("-o", "out", "--root", photos, "--part-size", 5)
    run(write(tmp_path / "pairs.csv", PAIRS), *arguments)
    before = stamps(tmp_path / "out")
    if not changed:
        write(tmp_path / "pairs.csv", PAIRS[::-1])
    status, _, err = run(tmp_path / "pairs.csv", *arguments, *changed)
    assert status == 2
    assert f"holds a job of other {named}" in err
    assert "-o" in err
    assert err.count("\n") == 1
    assert stamps(tmp_path / "out") == before


def test_a_job_of_which_nothing_is_finished_may_be_corrected(photos, tmp_path, expected, run):
    arguments = (write(tmp_path / "pairs.csv", PAIRS), "-o", tmp_path / "out", "--root", photos)
    assert run(*arguments, "--layer", "feature", "--part-size", 3)[0] == 2
    assert run(*arguments, "--part-size", 20)[0] == 0
    check(read(tmp_path / "out"), PAIRS, expected)


def test_a_second_run_at_the_same_time_is_an_error(photos, tmp_path, run):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "_lock"):
        status, _, err = run(write(tmp_path / "pairs.csv", PAIRS), "-o", tmp_path / "out", "--root", photos)
    assert status == 2
    assert "another run is at work" in err
    assert err.count("\n") == 1


# Worker processes

JOB = [*(PAIRS * 2)[:39], ("nope.jpg", NAMES[0])]
PARTS = 14


@pytest.fixture(scope="session")
def job(photos, tmp_path_factory):
    """The arguments of a job, without its output."""
    pairs = write(tmp_path_factory.mktemp("job") / "pairs.csv", JOB, [f"{i:02}" for i in range(40)])
    work = ["--part-size", "3", "--batch-size", "2", "--workers", "2", "--size", "256"]  # large, to have time to kill
    return [str(pairs), "--root", str(photos), *work]


def start(job, output, *arguments, folder=None):
    """The command as users run it, in a session of its own, by which its processes are found."""
    return subprocess.Popen(
        [*COMMAND, *job, "-o", str(output), *arguments],
        env=ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def undisturbed(job, tmp_path_factory):
    """The files of a run that nobody disturbed, and the seconds that it took."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    began = time.monotonic()
    finishes(start(job, output))
    return contents(output), time.monotonic() - began


def finishes(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "explained 39 pairs, 1 failed (1 no such file)" in out


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.parquet")}


def living(session):
    """The processes of a session, but for zombies: (pid, command line)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, *fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == session and state != "Z":
                found.append((int(process.name), (process / "cmdline").read_text()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# Starts the command many times without its imports: a process that has made them forks, and so do the workers. It reads
# arguments and a file for what a run prints; it writes the process and, when that has ended, its status.
FORKING = """
import json, multiprocessing, os, sys
from captum_fam import batch, cli
context = multiprocessing.get_context("fork")
for line in sys.stdin:
    arguments, errors = json.loads(line)
    pid = os.fork()
    if not pid:
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(os.open(errors, os.O_RDWR | os.O_CREAT), descriptor)
        multiprocessing.get_context = lambda method: context
        sys.argv = ["captum-fam", "batch", *arguments]
        cli.main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forked:
    """A run of the command by such a process, with the part of subprocess.Popen that is needed here."""

    def __init__(self, server, arguments, errors):
        self.server, self.errors = server, errors
        server.stdin.write(json.dumps([arguments, str(errors)]) + "\n")
        server.stdin.flush()
        self.pid, self.returncode = int(server.stdout.readline()), None

    def poll(self):
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between opening and reading
            return 0
        return 0 if state == "Z" else None

    def communicate(self, timeout=None):
        self.returncode = int(self.server.stdout.readline())
        text = self.errors.read_text() if self.errors.exists() else ""
        return text, text


@pytest.fixture(scope="session")
def forked(job, tmp_path_factory):
    """A start that takes no time."""
    errors = tmp_path_factory.mktemp("forked") / "errors"
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def begin(job, output):
            errors.unlink(missing_ok=True)
            return Forked(server, [*job, "-o", str(output)], errors)

        yield begin
        server.stdin.close()


@pytest.fixture(scope="session")
def forked_duration(job, undisturbed, forked, tmp_path_factory):
    """The seconds that such a run takes, undisturbed."""
    output, began = tmp_path_factory.mktemp("forked") / "out", time.monotonic()
    finishes(forked(job, output))
    assert contents(output) == undisturbed[0]
    return time.monotonic() - began


def until(condition, seconds=240.0, pause=0.0005):
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def test_worker_processes_find_what_one_call_for_each_pair_does(undisturbed, photos, tmp_path):
    for name, content in undisturbed[0].items():
        (tmp_path / name).write_bytes(content)
    rows = read(tmp_path)
    check(rows[:-1], JOB[:-1], one_by_one(photos, 256))
    assert [row["id"] for row in rows] == [f"{i:02}" for i in range(40)]
    assert "nope.jpg" in rows[-1]["error"]


def test_an_encoder_that_no_worker_can_load_is_one_line(job, tmp_path):
    process = start(job, tmp_path / "out", "--layer", "feature")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("captum-fam: the encoder has no layer 'feature': did you mean features")
    assert err.count("\n") == 1


@linux
def test_a_worker_that_dies_is_one_line_and_the_next_run_finishes(job, undisturbed, tmp_path):
    output = tmp_path / "out"
    process = start(job, output)
    assert until(lambda: list(output.glob("part-*")))
    workers = [pid for pid, command in living(process.pid) if "spawn_main" in command]
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert "a worker process died" in err
    assert "--workers" in err
    assert err.count("\n") == 1
    assert until(lambda: not living(process.pid), 5)
    finishes(start(job, output))
    assert contents(output) == undisturbed[0]


@linux
def test_an_interrupt_ends_all_at_once(photos, factories):
    Image.new("RGB", (8, 8), (255,) * 3).save(factories / "bright.png")
    pairs = write(factories / "pairs.csv", [PAIRS[0], *[(str(factories / "bright.png"), NAMES[0])] * 5])
    job = [str(pairs), "--root", str(photos), "--encoder", "batch_factories:waiting", "--layer", "features"]
    process = start(job, factories / "out", "--part-size", "1", "--workers", "2", folder=factories)
    assert until(lambda: list(factories.glob("out/part-*")) and len(list(factories.glob("at_work-*"))) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert list(stamps(factories / "out")) == ["part-000000.parquet"]
    assert (process.returncode, out, err.strip()) == (130, "", "captum-fam: interrupted")
    assert until(lambda: not living(process.pid), 5)


def kill(process, output, choose, duration):
    """At a random moment: of the whole run, or, as start-up takes most of it, of the next few parts."""
    began, before, left = time.monotonic(), len(stamps(output)), set(output.glob("_tmp-*"))
    when, wanted = choose.choice(["time", "part", "writing"]), choose.randrange(before, min(before + 4, PARTS))
    moment, delay = choose.uniform(0, duration), choose.uniform(0, 0.2) if when == "part" else 0

    def reached():
        if when == "time":
            return time.monotonic() - began > moment
        if when == "part":
            return len(stamps(output)) > wanted
        return len(stamps(output)) >= wanted and set(output.glob("_tmp-*")) - left

    until(lambda: process.poll() is not None or reached(), pause=0.0002)
    time.sleep(delay)
    everyone = choose.random() < 0.5
    if process.poll() is None:
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGKILL)
    found = sorted({p.name.split("-")[0] for p in output.glob("_*")})
    print(
        f"killed {'all' if everyone else 'the parent'}, by {when}, after {time.monotonic() - began:.2f} s:"
        f" {len(stamps(output))} parts, {before} before, and {', '.join(found) or 'nothing'}"
    )
    process.communicate()


def ends_as_if_undisturbed(begin, job, undisturbed, duration, output, seed, kills):
    choose, finished, sessions = random.Random(seed), {}, []

    def run(then):
        process = begin(job, output)  # while workers of the one before may still be about
        sessions.append(process.pid)
        then(process)
        now = stamps(output)
        assert {name: now.get(name) for name in finished} == finished
        finished.update(now)

    for _ in range(kills):
        if len(finished) < PARTS:
            run(lambda process: kill(process, output, choose, duration))
    run(finishes)
    assert contents(output) == undisturbed
    assert [row["id"] for row in read(output)] == [f"{i:02}" for i in range(40)]
    assert not list(output.glob("_tmp*"))
    assert until(lambda: not any(living(session) for session in sessions), 20, 0.1)


@linux
def test_killed_at_any_moment_it_ends_as_if_undisturbed(job, undisturbed, tmp_path):
    files, duration = undisturbed
    ends_as_if_undisturbed(start, job, files, duration, tmp_path / "out", seed=0, kills=3)


@linux
@pytest.mark.parametrize("seed", range(int(os.environ.get("CAPTUM_FAM_KILLS", "3"))))
def test_killed_many_times_during_the_work_it_ends_as_if_undisturbed(
    job, undisturbed, forked, forked_duration, tmp_path, seed
):
    ends_as_if_undisturbed(forked, job, undisturbed[0], forked_duration, tmp_path / "out", seed, kills=8)
