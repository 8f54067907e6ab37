"""Images and lists of the batch job in stores: what fsspec opens is explained as files are, and what a store costs."""

# ruff: noqa: F811  # fixtures of other tests

import csv
import os
import tempfile
import threading
import zipfile
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_batch import NAMES, PAIRS, contents, in_process, photos, run, stamps, write  # noqa: F401
from test_batch_options import SIZE, small  # noqa: F401

from captum_fam._files import is_address, located, within
from captum_fam.images import read_image

pq = pytest.importorskip("pyarrow.parquet")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _local  # noqa: E402

ENCODER = {"encoder": "batch_small:small", "size": SIZE, "workers": 1}
COMMAND = ("--encoder", "batch_small:small", "--size", SIZE, "--workers", 1)
ROOT = "memory://bucket/photos"


@pytest.fixture
def bucket(photos, small):
    """The photographs in fsspec's memory, and a function that puts a list of pairs beside them."""
    store = fsspec.filesystem("memory")
    for file in photos.rglob("*.*g"):
        if file.is_file():
            store.pipe(f"/bucket/photos/{file.relative_to(photos).as_posix()}", file.read_bytes())

    def listed(name, pairs):
        store.pipe(f"/bucket/{name}", write(Path(name), pairs).read_bytes())
        return f"memory://bucket/{name}"

    yield listed
    store.rm("/bucket", recursive=True)


def table(folder):
    return pq.read_table(folder)


# The same as files


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_list_and_images_in_a_store_give_bit_for_bit_what_files_give(bucket, photos, suffix):
    address = bucket(f"pairs{suffix}", PAIRS)
    found = batch.explain_pairs(address, "stored", root=ROOT, part_size=10, sides="both", **ENCODER)
    assert (found.explained, found.failed) == (25, 0)
    batch.explain_pairs(f"pairs{suffix}", "files", root=photos, part_size=10, sides="both", **ENCODER)
    assert table("stored").equals(table("files"))
    assert len(table("stored")) == 25


def forms(photos, name):
    """Of one image: from the root, as an absolute path, and addresses."""
    return [name, str(photos / name), f"{ROOT}/{name}", f"memory:///bucket/photos/{name}", f"file://{photos}/{name}"]


@given(data=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_an_image_is_named_its_rows_have_the_same_values(bucket, photos, in_process, data):
    names = data.draw(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=5))
    form = {
        name: data.draw(st.sampled_from(forms(photos, name))) for name in sorted({n for pair in names for n in pair})
    }
    named = [(form[query], form[reference]) for query, reference in names]  # two names would be two images
    root = data.draw(st.sampled_from([photos, f"file://{photos}", ROOT, f"{ROOT}/"]))
    with tempfile.TemporaryDirectory() as folder:
        for out, pairs in (("named", named), ("files", [tuple(str(photos / n) for n in pair) for pair in names])):
            batch.explain_pairs(write(Path(folder, f"{out}.csv"), pairs), Path(folder, out), root=root, **ENCODER)
        found, expected = table(f"{folder}/named"), table(f"{folder}/files")
    assert found.drop_columns(["query", "reference"]).equals(expected.drop_columns(["query", "reference"]))
    assert found["failure"].null_count == len(names)
    assert list(zip(found["query"].to_pylist(), found["reference"].to_pylist())) == named  # as they were given


def test_stored_pairs_open_their_images_in_the_store(bucket, photos):
    batch.explain_pairs(bucket("pairs.csv", PAIRS[1:2]), "out", root=ROOT, **ENCODER)
    [pair] = batch.read_maps("out")
    for image, name in zip(pair.images(), PAIRS[1]):
        assert np.array_equal(np.asarray(image), np.asarray(read_image(photos / name)))


def test_a_job_that_was_stopped_goes_on_and_a_list_that_changed_is_another_job(bucket, photos):
    address = bucket("pairs.csv", PAIRS)
    explain = {"root": ROOT, "part_size": 4, **ENCODER}
    batch.explain_pairs(address, "out", **explain)
    before, when = contents(Path("out")), stamps(Path("out"))
    Path("out/part-000003.parquet").unlink()
    batch.explain_pairs(address, "out", **explain)
    assert contents(Path("out")) == before
    changed = [name for name, stamp in stamps(Path("out")).items() if stamp != when[name]]
    assert changed == ["part-000003.parquet"]
    bucket("pairs.csv", PAIRS[::-1])
    with pytest.raises(ValueError, match="out holds a job of other pairs: pass the same"):
        batch.explain_pairs(address, "out", **explain)
    with pytest.raises(ValueError, match=r"of other root \('memory://bucket/photos' then\)"):
        batch.explain_pairs(bucket("pairs.csv", PAIRS), "out", **explain | {"root": photos})


@pytest.fixture
def archive(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for name in NAMES:
            file.write(photos / name, name)
    return lambda name: f"zip://{name}::file://{tmp_path}/photos.zip"


def test_worker_processes_read_addresses(photos, small, archive, monkeypatch):
    def not_here(todo, take=_local._next):
        return None if threading.current_thread() is threading.main_thread() else take(todo)

    pairs = write(Path("pairs.csv"), [(archive(query), archive(reference)) for query, reference in PAIRS])
    with monkeypatch.context() as patch:
        patch.setattr(_local, "_next", not_here)  # so that another process explains all parts
        found = batch.explain_pairs(pairs, "out", part_size=13, **ENCODER | {"workers": 2})
    assert (found.explained, found.failed) == (25, 0)
    batch.explain_pairs(write(Path("files.csv"), PAIRS), "files", root=photos, part_size=13, **ENCODER)
    for name in ("score", "map"):
        assert table("out")[name].equals(table("files")[name])


# In place of a list


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([ROOT], [NAMES[0], "broken.jpg", *NAMES[1:3], "cut.jpg", *NAMES[3:]]),
        (["memory://bucket"], [NAMES[0], "broken.jpg", *NAMES[1:3], "cut.jpg", *NAMES[3:]]),
        ([f"{ROOT}/*o*.jpg"], [NAMES[0], "broken.jpg", *NAMES[2:4]]),
        ([f"{ROOT}/{NAMES[1]}", f"{ROOT}/sub/", f"{ROOT}/{NAMES[1]}"], [NAMES[1], NAMES[4]]),
    ],
    ids=["a folder", "a bucket", "a pattern", "names and folders"],
)
def test_a_folder_a_pattern_or_names_in_a_store_are_images(bucket, in_process, given, names):
    fsspec.filesystem("memory").pipe({"/bucket/photos/notes.txt": b"no image", "/bucket/photos/.t/a.jpg": b""})
    found = batch.explain_pairs(given, "out", **ENCODER)
    addresses = [f"{ROOT}/{name}" for name in names]
    pairs = list(permutations(addresses, 2))
    assert list(zip(table("out")["query"].to_pylist(), table("out")["reference"].to_pylist())) == pairs
    assert found.failed == sum(any("broken" in name or "cut" in name for name in pair) for pair in pairs)


def test_files_beside_a_root_in_a_store_have_whole_paths(bucket, photos, in_process):
    found = batch.explain_pairs([photos / NAMES[0], f"file://{photos / NAMES[1]}"], "out", root=ROOT, **ENCODER)
    assert found.failed == 0
    assert table("out")["query"].to_pylist() == [str(photos / name) for name in NAMES[:2]]


def test_the_images_of_a_chain_must_be_named(archive, small):
    with pytest.raises(
        ValueError, match=r"^cannot look for the images in zip://\*\.jpg::file:.*: write their addresses"
    ):
        batch.explain_pairs(archive("*.jpg"), "out", **ENCODER)
    with pytest.raises(ValueError, match="a pair needs two images, but memory://empty has none"):
        batch.explain_pairs("memory://empty", "out", **ENCODER)


# What an error costs


def test_an_image_that_is_missing_or_broken_in_a_store_costs_its_own_rows(bucket, run):
    others = [("nope.jpg", NAMES[0]), (NAMES[0], f"{ROOT}/broken.jpg"), ("cut.jpg", NAMES[1]), PAIRS[0]]
    command = (bucket("pairs.csv", [*others, PAIRS[1]]), "-o", "out", "--root", ROOT, *COMMAND)
    status, out, err = run(*command, "--errors", "errors.csv")
    assert (status, err) == (1, "")
    assert "explained 2 pairs, 3 failed (2 cannot be read, 1 no such file)" in out
    rows = table("out").to_pylist()
    assert [row["failure"] for row in rows] == ["no such file", "cannot be read", "cannot be read", None, None]
    assert rows[0]["error"] == f"there is no image {ROOT}/nope.jpg: check the address"
    assert rows[1]["error"].startswith(f"cannot read {ROOT}/broken.jpg as an image: pass a file that Pillow opens")
    assert "truncated" in rows[2]["error"]
    with open("errors.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(row["query"], row["reference"]) for row in listed] == others[:3]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_none_under_an_address_either(small, photos, in_process):
    os.mkfifo("pipe.jpg")
    address = f"file://{Path.cwd()}/pipe.jpg"
    pairs = write(Path("pairs.csv"), [(address, str(photos / NAMES[0]))])
    batch.explain_pairs(pairs, "out", **ENCODER)
    assert table("out")["error"].to_pylist() == [
        f"cannot read {Path.cwd()}/pipe.jpg as an image: it is a pipe, pass a file such as PNG or JPEG"
    ]
    os.mkfifo("pipe.csv")
    with pytest.raises(ValueError, match=r"pipe\.csv: it is a pipe"):
        batch.explain_pairs(f"file://{Path.cwd()}/pipe.csv", "none", **ENCODER)


class Store(MemoryFileSystem):
    """fsspec's memory under another name."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace(f"{cls.protocol}://", "memory://"))


@pytest.fixture
def lacking(monkeypatch):
    """Stores under lacking:// are of a library that is not installed."""
    missing = {"class": "no_such_library.Store", "err": "Install no_such_library to access these stores"}
    monkeypatch.setitem(known_implementations, "lacking", missing)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("lacking://bucket/pairs.csv", {}),
        ("lacking://bucket/photos", {}),
        ("pairs.csv", {"root": "lacking://bucket/photos"}),
    ],
    ids=["list", "folder", "root"],
)
def test_a_store_whose_library_is_missing_is_said_before_anything_is_done(bucket, lacking, given, options):
    bucket("pairs.csv", PAIRS)
    with pytest.raises(ValueError, match=r"^cannot read lacking://bucket/\S+: Install no_such_library to access"):
        batch.explain_pairs(given, "out", **options, **ENCODER)
    assert not Path("out").exists()


def test_a_library_that_is_missing_for_an_image_ends_the_job_which_goes_on_with_it(bucket, lacking, run, monkeypatch):
    pairs = bucket("pairs.csv", [PAIRS[1], (f"lacking://bucket/photos/{NAMES[0]}", NAMES[1])])
    command = (pairs, "-o", "out", "--root", ROOT, *COMMAND, "--part-size", 1)
    status, _, err = run(*command)
    assert status == 2
    assert err == (
        f"captum-fam: cannot read lacking://bucket/photos/{NAMES[0]}: Install no_such_library to access these stores\n"
    )
    assert sorted(contents(Path("out"))) == ["part-000000.parquet"]
    installed = type("Installed", (Store,), {"protocol": "lacking"})
    monkeypatch.setitem(_registry, "lacking", installed)
    status, _, err = run(*command)
    assert (status, err) == (0, "")
    assert table("out")["map"].to_pylist()[0] == table("out")["map"].to_pylist()[1]


@pytest.fixture
def denying(monkeypatch):
    """Stores under denying:// that give nothing in private folders, and count what they are asked for."""

    class Denying(Store):
        protocol = "denying"
        asked: ClassVar = Counter()

        def cat_file(self, path, **options):
            self.asked[path] += 1
            if "private" in path:
                raise PermissionError("Access\nDenied")
            return super().cat_file(path, **options)

    monkeypatch.setitem(_registry, "denying", Denying)
    return Denying


def denied(count, then=()):
    return [(f"denying://bucket/private/{n}.jpg", NAMES[0]) for n in range(count)] + list(then)


def test_access_that_is_denied_costs_its_own_rows(bucket, denying, in_process):
    pairs = bucket("pairs.csv", denied(40, [(f"denying://bucket/photos/{NAMES[1]}", NAMES[0])]))
    found = batch.explain_pairs(pairs, "out", root=ROOT, **ENCODER)
    assert (found.explained, found.failures) == (1, {"cannot be read": 40})  # the store of the root gives its image
    assert found.error == (
        "cannot read denying://bucket/private/0.jpg (PermissionError: Access Denied): check the address, the network"
        " and your credentials"
    )


def test_a_worker_that_is_given_none_of_many_images_ends_the_job_early(bucket, denying, in_process):
    pairs = bucket("pairs.csv", [(query, query) for query, _ in denied(200)])
    text = "^no store gave any of 32 images: start again .*; the last error: cannot read denying://bucket/private/"
    with pytest.raises(ValueError, match=text):
        batch.explain_pairs(pairs, "out", **ENCODER)
    assert sum(denying.asked.values()) < 100
    assert contents(Path("out")) == {}
    fewer = bucket("fewer.csv", [(query, query) for query, _ in denied(31)])
    assert batch.explain_pairs(fewer, "fewer", **ENCODER).failed == 31


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"output": "s3://bucket/maps"}, "^-o must be a folder of the file system, .* copy the folder to the store"),
        (
            {"root": Path("s3://bucket/photos")},
            "^s3:/bucket/photos is an address, and a Path loses one of its slashes: pass it",
        ),
        ({"pairs": Path("s3://bucket/pairs.csv")}, "^s3:/bucket/pairs.csv is an address, and a Path loses"),
        ({"weights": "s3://bucket/w.pt"}, "^there is no file s3:/bucket/w.pt: it is an address; save what is there"),
        ({"pairs": "memory://nope.csv"}, "^there is no file memory://nope.csv: check the address"),
        ({"pairs": "memory://bucket/photos/cat.jpg"}, "^a pair needs two images"),
    ],
    ids=["output", "path", "list as a path", "weights", "no list", "one image"],
)
def test_what_can_be_no_address_says_what_to_do(bucket, option, text):
    with pytest.raises(ValueError, match=text):
        batch.explain_pairs(**{"pairs": bucket("pairs.csv", PAIRS), "output": "out"} | option, **ENCODER)
    assert not Path("out").exists()


# How often a store is asked


def test_an_image_is_one_request_as_a_query_and_one_as_a_reference(bucket, denying, in_process):
    pairs = bucket("pairs.csv", PAIRS)
    assert batch.explain_pairs(pairs, "out", root="denying://bucket/photos", batch_size=2, **ENCODER).failed == 0
    assert set(denying.asked.values()) <= {1, 2}
    assert len(denying.asked) == len(NAMES)
    before = denying.asked.copy()
    batch.explain_pairs(pairs, "out", root="denying://bucket/photos", batch_size=2, **ENCODER)
    assert denying.asked == before


@contextmanager
def served(folder):
    """A web server, and what it is asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            file = folder / self.path.lstrip("/")
            content = file.read_bytes() if file.is_file() else b""
            self.send_response(500 if "error" in self.path else 200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_the_web_is_a_store_too_and_an_image_is_one_request(photos, small, in_process):
    pytest.importorskip("aiohttp")
    with served(photos) as (root, asked):
        pairs = [(NAMES[1], NAMES[4]), ("nope.jpg", NAMES[4]), (f"{root}/error.jpg", NAMES[4])]
        found = batch.explain_pairs(write(Path("pairs.csv"), pairs), "out", root=root, **ENCODER)
    assert (found.explained, found.failures) == (1, {"no such file": 1, "cannot be read": 1})
    assert sorted(asked) == sorted(["/cat.jpg", "/error.jpg", "/nope.jpg", "/sub/motorcycle.png"])
    batch.explain_pairs("pairs.csv", "files", root=photos, **ENCODER)
    assert table("out")["map"][0] == table("files")["map"][0]


# What is an address


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("s3://bucket/a b.jpg", "s3://bucket/a b.jpg"),
        ("https://host/a.jpg?key=1", "https://host/a.jpg?key=1"),
        ("zip://a.jpg::s3://bucket/a.zip", "zip://a.jpg::s3://bucket/a.zip"),
        ("simplecache::s3://bucket/a.jpg", "simplecache::s3://bucket/a.jpg"),
        ("file:///photos/a.jpg", Path("/photos/a.jpg")),
        ("local:///photos/a.jpg", Path("/photos/a.jpg")),
        ("C:/photos/a.jpg", Path("C:/photos/a.jpg")),
        ("c://photos/a.jpg", Path("c://photos/a.jpg")),
        ("cat::dog.jpg", Path("cat::dog.jpg")),
        ("a/s3://bucket", Path("a/s3://bucket")),
        ("12:30.jpg", Path("12:30.jpg")),
    ],
)
def test_an_address_names_its_store_and_all_else_is_a_path(path, found):
    assert located(path) == found
    assert type(located(path)) is type(located(found) if isinstance(found, str) else found)
    assert is_address(path) == ("://" in path and not path.startswith(("c:", "a/")))


@given(st.text(max_size=20))
def test_text_without_a_store_is_a_path(text):
    if "://" not in text:
        assert located(text) == Path(text)
        assert within(Path("root"), text) == Path("root") / text


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("s3://bucket", "sub/a.jpg", "s3://bucket/sub/a.jpg"),
        ("s3://bucket/", "a.jpg", "s3://bucket/a.jpg"),
        ("memory://", "a.jpg", "memory://a.jpg"),
        ("s3://bucket", "/photos/a.jpg", Path("/photos/a.jpg")),
        ("s3://bucket", "gs://other/a.jpg", "gs://other/a.jpg"),
        (Path("photos"), "gs://other/a.jpg", "gs://other/a.jpg"),
        (Path("photos"), "a.jpg", Path("photos/a.jpg")),
        (Path("photos"), "/a.jpg", Path("/a.jpg")),
    ],
)
def test_a_relative_path_starts_at_the_root(root, path, found):
    assert within(root, path) == found
