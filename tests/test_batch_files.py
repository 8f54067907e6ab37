"""Files of the batch job that are not as they should be: pairs, parts of before, a full disk, folders of others."""

# ruff: noqa: F811  # fixtures of other tests

import csv
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batch import NAMES, PAIRS, contents, factories, in_process, photos, read, run, stamps, write  # noqa: F401
from test_cli_outside import damaged

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _engines, _job, _pairs, _part, _work  # noqa: E402

posix = pytest.mark.skipif(os.name != "posix", reason="names and files of POSIX")
SIX = [*PAIRS[:5], ("nope.jpg", NAMES[0])]


def files(folder):
    """All that is in a folder, but for the lock."""
    return {p.name: p.is_file() and p.read_bytes() for p in folder.iterdir() if p.name != "_lock"}


@pytest.fixture(scope="module")
def jobs(photos, tmp_path_factory):
    """Folders of finished jobs, three parts each: by encoder, as pairs of another order, and of another size."""
    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_engines.ENGINES, "local", here)
        for name, pairs, options in (("job", SIX, {}), ("turned", SIX[::-1], {}), ("small", SIX, {"size": 64})):
            found = batch.explain_pairs(
                write(folder / f"{name}.csv", pairs), folder / name, root=photos, part_size=2, **options
            )
            assert (found.explained, found.failed) == (5, 1)
    return folder


def here(left, options, workers, parts):
    """The work in this process."""
    explain = _part.PartExplainer(**options, threads=1)
    for part in left:
        yield explain(part)


@pytest.fixture
def again(jobs, photos, tmp_path, run):
    """A copy of the finished job, and what starts it again."""
    output = tmp_path / "again"
    shutil.copytree(jobs / "job", output)

    def again(*options, pairs="job"):
        return run(jobs / f"{pairs}.csv", "-o", output, "--root", photos, "--part-size", 2, *options)

    return output, again


# Parts of before


def rewritten(change):
    """A damage: the part's table, changed, with all that the file says about itself."""

    def damage(file, jobs):
        table = pq.read_table(file)
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)

    return damage


def flipped(place, bit):
    def damage(file, jobs):
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        file.write_bytes(content)

    return damage


def in_place(make):
    def damage(file, jobs):
        file.unlink()
        make(file)

    return damage


def of_another_layer(file, jobs):
    """As this job would write it, if its encoder had become another in between."""
    job = _job.seal(json.loads((file.parent / "_batch.json").read_text())["job"])
    _part.write_part(file, pq.read_table(file), "head", job, 1)


PART = "part-000001.parquet"
DAMAGES = {
    "a part of other pairs": lambda file, jobs: shutil.copy(jobs / "turned" / PART, file),
    "a part of another size": lambda file, jobs: shutil.copy(jobs / "small" / PART, file),
    "a part twice": lambda file, jobs: shutil.copy(file.with_name("part-000000.parquet"), file),
    "any Parquet": lambda file, jobs: pq.write_table(pa.table({"a": [1, 2]}), file),
    "empty": lambda file, jobs: file.write_bytes(b""),
    "half of it": lambda file, jobs: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "its last byte lost": lambda file, jobs: file.write_bytes(file.read_bytes()[:-1]),
    **{f"a bit flipped at {place}": flipped(place, bit) for bit, place in enumerate((0.05, 0.2, 0.35, 0.5, 0.7, 0.9))},
    "a row less": rewritten(lambda table: table[:1]),
    "a row twice": rewritten(lambda table: pa.concat_tables([table, table[1:]])),
    "rows in another order": rewritten(lambda table: table.take([1, 0])),
    "other references": rewritten(lambda table: table.set_column(2, "reference", table["query"])),
    "a column less": rewritten(lambda table: table.drop_columns(["scale"])),
    "a column more": rewritten(lambda table: table.append_column("more", table["id"])),
    "maps of float32": rewritten(
        lambda table: table.set_column(4, "map", pa.array([[1.0]] * len(table), pa.list_(pa.float32())))
    ),
    "another layer": of_another_layer,
    "a folder": in_place(Path.mkdir),
    "a pipe": pytest.param(in_place(os.mkfifo), marks=posix),
    "a link to nothing": in_place(lambda file: file.symlink_to("nothing")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_part_that_is_not_as_the_job_wrote_it_is_named_and_nothing_is_done(again, jobs, damage):
    output, start = again
    damage(output / PART, jobs)
    before = {p.name for p in output.iterdir()}
    status, out, err = start()
    assert (status, out) == (2, "")
    assert str(output / PART) in err
    assert "delete" in err
    assert err.count("\n") == 1
    assert {p.name for p in output.iterdir()} == before
    (shutil.rmtree if (output / PART).is_dir() else os.unlink)(output / PART)
    status, out, err = start()
    assert (status, err) == (1, "")
    assert "explained 5 pairs, 1 failed" in out
    assert files(output) == files(jobs / "job")


@pytest.mark.parametrize("name", ["part-000003.parquet", "part-000001 (copy).parquet", "other.parquet"])
def test_a_file_that_would_be_read_with_the_parts_is_named(again, name):
    output, start = again
    shutil.copy(output / PART, output / name)
    status, _, err = start()
    assert status == 2
    assert str(output / name) in err
    assert "delete or move it" in err
    (output / name).rename(output / f"_{name}")  # no reader takes it
    assert start()[0] == 1


def test_whatever_bit_is_flipped_the_part_is_refused(jobs, tmp_path):
    """In an eleventh of the bytes: in the pages, in their headers, and in the footer."""
    job = _job.seal(json.loads((jobs / "job" / "_batch.json").read_text())["job"])
    content = (jobs / "job" / PART).read_bytes()
    for place in range(0, len(content), 11):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (tmp_path / PART).write_bytes(changed)
        with pytest.raises(ValueError, match=PART):
            _part.finished(tmp_path, 1, job)
    (tmp_path / PART).write_bytes(content)
    assert _part.finished(tmp_path, 1, job) == "features"


def test_a_seal_is_found_among_paths_that_look_like_one(tmp_path):
    rows = pa.table({"query": ["0" * 64, "0" * 99]})
    _part.write_part(tmp_path / PART, rows, "0" * 64, "job", 1)
    assert _part.finished(tmp_path, 1, "job") == "0" * 64
    assert pq.read_table(tmp_path / PART).equals(rows)
    with pytest.raises(ValueError, match="no part 1 of this job"):
        _part.finished(tmp_path, 1, "another job")


@pytest.mark.parametrize(
    "damage",
    [
        flipped(0.5, 3),
        lambda file, jobs: file.write_bytes(file.read_bytes()[:-9]),
        in_place(Path.touch),
        lambda file, jobs: shutil.copy(jobs / "turned" / "_pairs.arrow", file),
        in_place(Path.mkdir),
    ],
    ids=["a bit", "its end", "empty", "of other pairs", "a folder"],
)
def test_a_copy_of_the_pairs_that_is_damaged_is_named_and_can_be_deleted(again, jobs, damage):
    output, start = again
    damage(output / "_pairs.arrow", jobs)
    status, _, err = start()
    assert status == 2
    assert f"{output / '_pairs.arrow'} is not as this job wrote it: delete it" in err
    (shutil.rmtree if (output / "_pairs.arrow").is_dir() else os.unlink)(output / "_pairs.arrow")
    (output / PART).unlink()
    assert start()[0] == 1
    assert files(output) == files(jobs / "job")


JSON = {
    "empty": lambda text: "",
    "half of it": lambda text: text[: len(text) // 2],
    "another number of pairs": lambda text: text.replace('"pairs": 6', '"pairs": 4'),
    "another encoder": lambda text: text.replace("bundled", "bundlee"),
    "no seal": lambda text: json.dumps({"job": json.loads(text)["job"], "pairs": 6}),
    "a list": lambda text: "[]",
    "no UTF-8": lambda text: text.replace("bundled", os.fsdecode(b"\xff")),
    "of another program": lambda text: '{"tasks": 3}',
}


@pytest.mark.parametrize("change", JSON.values(), ids=JSON)
def test_a_description_of_the_job_that_is_damaged_is_named_and_nothing_is_done(again, change):
    output, start = again
    file = output / "_batch.json"
    file.write_bytes(os.fsencode(change(file.read_text())))
    before = files(output)
    status, _, err = start()
    assert status == 2
    assert f"{file} is not as this version writes it: pass another folder with -o" in err
    assert err.count("\n") == 1
    assert files(output) == before


@posix
def test_a_pipe_in_place_of_the_description_does_not_wait(again):
    output, start = again
    (output / "_batch.json").unlink()
    os.mkfifo(output / "_batch.json")
    assert "_batch.json is not as" in start()[2]


def test_a_part_that_exists_is_not_made_again(jobs, tmp_path, monkeypatch):
    """By a worker that outlived its run; the encoder is not even loaded."""
    output = tmp_path / "out"
    shutil.copytree(jobs / "job", output)
    job = _job.seal(json.loads((output / "_batch.json").read_text())["job"])
    monkeypatch.setattr(_part, "ready_encoder", None)
    before = stamps(output)
    explain = _part.PartExplainer(
        output, job, "bundled", None, "Relax", "cosine", None, None, "query", None, ".", 2, 1, size=None
    )
    assert [explain(part) for part in range(3)] == [(2, [])] * 3
    assert stamps(output) == before
    (output / PART).write_bytes(b"")
    with pytest.raises(ValueError, match=PART):
        explain(1)


def test_what_is_left_is_explained_at_the_layer_of_what_is_done(again, jobs, monkeypatch):
    output, start = again
    (output / PART).unlink()
    asked = []

    def engine(left, options, *rest):
        asked.append((left, options["layer"]))
        return here(left, options, *rest)

    monkeypatch.setitem(_engines.ENGINES, "local", engine)
    for _ in range(2):
        assert start()[0] == 1
    assert asked == [([1], "features")]  # once: then nothing is left


# A run that is stopped in between, or refused


class Killed(BaseException):
    """As a kill: nothing catches it."""


def test_killed_between_other_pairs_and_their_description_the_job_of_before_can_be_started(
    jobs,
    photos,
    tmp_path,
    in_process,
    monkeypatch,
):
    arguments = {"output": tmp_path / "out", "root": photos, "part_size": 2}
    with pytest.raises(ValueError, match="no layer"):  # nothing is finished
        batch.explain_pairs(jobs / "job.csv", **arguments, layer="nope")
    described = json.loads((tmp_path / "out" / "_batch.json").read_text())["job"]["layer"]
    assert described == "nope"
    digest = _job.digest

    def killed(path):
        if path.name == "_pairs.arrow":
            raise Killed
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(_job, "digest", killed)
        with pytest.raises(Killed):
            batch.explain_pairs(jobs / "turned.csv", **arguments)
    with pytest.raises(ValueError, match="no layer 'nope'"):
        batch.explain_pairs(jobs / "job.csv", **arguments, layer="nope")
    assert batch.explain_pairs(jobs / "job.csv", **arguments).explained == 5
    assert contents(tmp_path / "out") == contents(jobs / "job")


def test_other_pairs_that_cannot_be_read_leave_no_description_of_the_pairs_of_before(
    jobs,
    photos,
    tmp_path,
    in_process,
):
    arguments = {"output": tmp_path / "out", "root": photos, "part_size": 2}
    with pytest.raises(ValueError, match="no layer"):
        batch.explain_pairs(jobs / "job.csv", **arguments, layer="nope")
    (tmp_path / "bad.csv").write_text("query,reference\n")
    with pytest.raises(ValueError, match="lists no pairs"):
        batch.explain_pairs(tmp_path / "bad.csv", **arguments)
    assert not list((tmp_path / "out").glob("_tmp*"))
    assert batch.explain_pairs(jobs / "turned.csv", **arguments).explained == 5
    assert contents(tmp_path / "out") == contents(jobs / "turned")


OWN = f"_tmp-77-{'0a' * 16}"
USERS = ["_tmp-notes", "_tmp-1-2", f"_tmp-77-{'0A' * 16}", f"_tmp-77-{'0a' * 16}.txt", f"_tmp--{'0a' * 16}"]


def test_of_files_with_such_names_only_those_of_a_run_are_deleted(again):
    output, start = again
    for name in [OWN, *USERS]:
        (output / name).write_text("mine")
    (output / f"_tmp-78-{'0a' * 16}").mkdir()
    assert start()[0] == 1
    assert {p.name for p in output.glob("_tmp*")} == {*USERS, f"_tmp-78-{'0a' * 16}"}


REFUSED = {
    "a folder of others": ("notes.txt", "mine", "is not empty (it has notes.txt)"),
    "a description of others": ("_batch.json", "{}", "is not as this version writes it"),
}


@pytest.mark.parametrize(("name", "content", "advice"), REFUSED.values(), ids=REFUSED)
def test_a_refused_run_leaves_a_folder_of_others_as_it_was(jobs, tmp_path, run, name, content, advice):
    (tmp_path / name).write_text(content)
    (tmp_path / OWN).write_text("mine")
    status, _, err = run(jobs / "job.csv", "-o", tmp_path)
    assert status == 2
    assert advice in err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: content, OWN: "mine"}


def test_a_run_whose_pairs_are_refused_leaves_no_folder(tmp_path, run):
    (tmp_path / "pairs.csv").write_text("query,hit\na,b\n")
    (tmp_path / "there").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "_lock").touch()
    for folder in ("a/new/folder", "there", "theirs"):
        assert run(tmp_path / "pairs.csv", "-o", tmp_path / folder)[0] == 2
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {
        *("pairs.csv", "there", "theirs", "theirs/_lock")
    }


def test_the_lock_of_a_job_stays(jobs):
    """Were it deleted, a run that has just opened it and one that makes it anew would both be alone."""
    assert (jobs / "job" / "_lock").exists()


def test_a_folder_that_cannot_be_read_is_named(jobs, tmp_path, run, monkeypatch):
    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    status, _, err = run(jobs / "job.csv", "-o", tmp_path)
    assert status == 2
    assert (
        f"cannot write to {tmp_path} (PermissionError: [Errno 13] Permission denied): pass another folder with" in err
    )


# A disk that is full


@pytest.fixture
def room():
    """Leaves room for files of so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@posix
@pytest.mark.parametrize(
    ("size", "name"), [(100, "_pairs.arrow"), (4000, "_batch.json"), (4000, "part-000000.parquet")]
)
def test_a_disk_that_is_full_is_said_of_the_file_that_is_written(photos, tmp_path, run, room, size, name):
    pairs = write(tmp_path / "pairs.csv", PAIRS[:8])
    arguments = (pairs, "-o", tmp_path / "out", "--root", photos, "--part-size", 8)
    room(size)
    status, _, err = run(*arguments, *(("--layer", "x" * size) if name == "_batch.json" else ()))
    room(None)
    assert status == 2
    assert f"cannot write {tmp_path / 'out' / name} (OSError: " in err
    assert "cannot read" not in err
    assert "make room" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("out/_tmp*"))
    assert run(*arguments)[0] == 0
    assert len(read(tmp_path / "out")) == 8


# Pairs


def table_of(columns, file):
    pq.write_table(pa.table(columns), file)
    return file


TEXT = pa.array(["b", "a", None])
KINDS = [
    pa.string(),
    pa.large_string(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
    *([pa.string_view()] if hasattr(pa, "string_view") else []),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("column", ["id", "query", "reference"])
def test_text_of_any_kind_is_the_same_text(tmp_path, kind, column):
    columns = {name: TEXT.cast(kind) if name == column else TEXT for name in ("id", "query", "reference")}
    table = pa.concat_tables(_pairs._read_pairs(table_of(columns, tmp_path / "pairs.parquet")))
    assert table.to_pydict() == {name: ["b", "a", None] for name in columns}
    assert table.schema.types == [pa.string()] * 3
    _pairs.write_pairs(tmp_path / "pairs.parquet", tmp_path / "copy", 2)
    with pa.memory_map(str(tmp_path / "copy")) as copy:
        assert pa.ipc.open_file(copy).read_all().to_pydict() == table.to_pydict()


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([b"\xff", b"", None]),
        pa.array([1.5, float("nan"), None]),
        pa.nulls(3),
        pa.array([[1], [], None]),
        pa.array([True, True, False]),
        pa.array([0, 1, 2], pa.duration("us")),
        pa.array([0, 1, 2], pa.timestamp("s", "UTC")),
    ],
    ids=lambda ids: str(ids.type),
)
def test_an_id_may_be_of_any_type_and_the_finished_job_is_recognised(
    photos,
    tmp_path,
    in_process,
    ids,
):
    paths = [NAMES[0]] * 3
    pairs = table_of({"id": ids, "query": paths, "reference": paths}, tmp_path / "pairs.parquet")
    for _ in range(2):
        assert batch.explain_pairs(pairs, tmp_path / "out", root=photos, part_size=2).explained == 3
    assert str([row["id"] for row in read(tmp_path / "out")]) == str(pq.read_table(pairs)["id"].to_pylist())


REFUSED_COLUMNS = {
    "bytes": ({"query": [b"a.png"], "reference": ["b"]}, "the column 'query' of {file} must hold paths as text, but"),
    "lists": ({"query": ["a"], "reference": [["b"]]}, "the column 'reference' of {file} must hold paths as text, but"),
    "structs": ({"query": [{"path": "a"}], "reference": ["b"]}, "the column 'query' of {file} must hold paths as text"),
    "numbers": ({"query": ["a"], "reference": [1]}, "must hold paths as text, but holds int64"),
    "categories of numbers": (
        {"query": ["a"], "reference": pa.array([1]).dictionary_encode()},
        "must hold paths as text, but holds int64",
    ),
    "no rows": ({"query": pa.array([], pa.string()), "reference": pa.array([], pa.string())}, "lists no pairs"),
    "no columns": ({}, "its columns are none"),
    "no UTF-8": (
        {"query": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()), "reference": ["b"]},
        "cannot read {file} (",
    ),
}


@pytest.mark.parametrize(("columns", "advice"), REFUSED_COLUMNS.values(), ids=REFUSED_COLUMNS)
def test_columns_that_hold_no_paths_are_refused(tmp_path, run, columns, advice):
    file = table_of(columns, tmp_path / "pairs.parquet")
    status, out, err = run(file, "-o", tmp_path / "out")
    assert (status, out) == (2, "")
    assert advice.format(file=file) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_two_columns_of_ids_are_refused(tmp_path, run, suffix):
    file, names = tmp_path / f"pairs{suffix}", ["id", "query", "id", "reference"]
    if suffix == ".csv":
        file.write_text(f"{','.join(names)}\n1,a,2,b\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names), file)
    status, _, err = run(file, "-o", tmp_path / "out")
    assert status == 2
    assert f"{file} must have one column 'id', but its columns are id, query, id, reference" in err


def test_a_column_of_nothing_is_an_error_of_each_row(photos, tmp_path, run):
    file = table_of({"query": pa.nulls(2), "reference": [NAMES[0]] * 2}, tmp_path / "pairs.parquet")
    status, _, err = run(file, "-o", tmp_path / "out", "--root", photos)
    assert status == 2
    assert "none of 2 pairs could be explained" in err
    assert "there is no path in the column 'query'" in err


CSV = {
    "a byte order mark": ("\ufeffquery,reference\r\na,b\r\n", [("a", "b")]),
    "newlines in names": ('query,reference\n"a\nb",c\n"d""e",\n', [("a\nb", "c"), ('d"e', None)]),
    "columns in another order": ("more,reference,query\n1,b,a\n", [("a", "b")]),
    "no newline at the end": ("query,reference\na,b", [("a", "b")]),
    "names of numbers": ("query,reference\n007,1e5\n", [("007", "1e5")]),
    "words that mean nothing elsewhere": ("query,reference\nNA,null\n", [("NA", "null")]),
    "a first line of Excel": ("\ufeffsep=;\r\nquery;reference\r\na,b;c\r\n", [("a,b", "c")]),
    "a first line of Excel in quotes": ('"sep=|"\nquery|reference\na|b\n', [("a", "b")]),
    "a first line of Excel with a tab": ("sep=\t\nquery\treference\na\tb\n", [("a", "b")]),
    "empty lines": ("query,reference\n\na,b\n\r\n\n", [("a", "b")]),
    "nothing after the columns": ("query,reference\na,b,,\n", [("a", "b")]),
    "old ends of lines": ("query,reference\ra,b\r", [("a", "b")]),
}


@pytest.mark.parametrize(("text", "rows"), CSV.values(), ids=CSV)
def test_a_csv_file_is_read_as_it_is(tmp_path, text, rows):
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8", newline="")
    table = pa.concat_tables(_pairs._read_pairs(tmp_path / "pairs.csv"))
    assert list(zip(table["query"].to_pylist(), table["reference"].to_pylist())) == rows


def test_a_row_that_is_not_as_the_header_says_costs_itself_alone(photos, tmp_path, run):
    rows = [
        f"1;{NAMES[0]};{NAMES[1]}",
        f"2;{NAMES[0]};{NAMES[1]};more",
        f"3;{NAMES[0]}",
        '4;"a"b;c',
        f"5;{NAMES[1]};{NAMES[0]}",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["sep=;", "id;query;reference", *rows, '6;a;"b']))
    output, errors = tmp_path / "out", tmp_path / "errors.csv"
    options = ("-o", output, "--root", photos, "--part-size", 2, "--errors", errors)
    status, out, _ = run(tmp_path / "pairs.csv", *options)
    found = read(output)
    assert (status, [row["id"] for row in found]) == (1, ["1", "2", "3", None, "5", None])
    assert [row["failure"] for row in found] == [None, *["bad row"] * 3, None, "bad row"]
    assert [(row["query"], row["reference"]) for row in found[1:3]] == [(NAMES[0], NAMES[1]), (NAMES[0], None)]
    texts = [row["error"] for row in found if row["error"]]
    assert texts[0] == ('line 4 of the list has 4 fields, but its header 3: put quotes around a name that has ";"')
    assert texts[1] == "line 5 of the list has 2 fields, but its header 3: add what is missing"
    for text, line in zip(texts[2:], (6, 8)):
        assert text.startswith(f"line {line} of the list cannot be read (")
        assert text.endswith("): mend its quotes")
    assert f"explained 2 pairs, 4 failed (4 bad row); the first: {texts[0]}" in out
    # The list of errors is written as the list was.
    with errors.open(newline="") as stream:
        told = list(csv.reader(stream, delimiter=";"))
    assert [row[0] for row in told] == ["id", "2", "3", "", ""]
    assert [row[4] for row in told[1:]] == texts
    assert set(pq.read_schema(output / "part-000000.parquet").names) == set(found[0])
    assert "bad" not in found[0]


def test_of_references_that_are_embeddings_a_bad_row_costs_itself_alone(photos, tmp_path, run):
    np.save(tmp_path / "z.npy", np.ones((2, 512), np.float32))
    (tmp_path / "pairs.csv").write_text(f"query,reference\n{NAMES[0]},1,2\n{NAMES[0]},1\n")
    options = ("--root", photos, "--reference-embeddings", tmp_path / "z.npy")
    assert run(tmp_path / "pairs.csv", "-o", tmp_path / "out", *options)[0] == 1
    assert [row["failure"] for row in read(tmp_path / "out")] == ["bad row", None]


OPEN = {
    "to the end": 'query,reference\na,b\nc,"d\ne,f\n',
    "to the next": 'query,reference\na,b\nc,"d\ne,"f"\ng,h\n',
    "longer than a name": 'query,reference\na,b\nc,"d\n' + "e,f\n" * 40000,
}


@pytest.mark.parametrize("text", OPEN.values(), ids=OPEN)
def test_a_quote_that_stays_open_swallows_no_rows(tmp_path, text):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read lines 3 to \d+ of .*pairs.csv \(.*close a quote that is open"):
        list(_pairs._read_pairs(tmp_path / "pairs.csv"))


def test_a_header_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "pairs.csv").write_text('query,"reference"s\na,b\n')
    with pytest.raises(ValueError, match=r"cannot read .*pairs.csv: line 1 of the list cannot be read"):
        list(_pairs._read_pairs(tmp_path / "pairs.csv"))


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv", ";")])
def test_the_list_of_errors_is_separated_as_the_list_is(photos, tmp_path, run, suffix, delimiter):
    file = tmp_path / f"pairs{suffix}"
    file.write_text(f"query{delimiter}reference\n{NAMES[0]}{delimiter}nope.jpg\n{NAMES[0]}{delimiter}{NAMES[1]}\n")
    assert run(file, "-o", tmp_path / "out", "--root", photos, "--errors", tmp_path / "e.csv")[0] == 1
    first = (tmp_path / "e.csv").read_text().splitlines()[0]
    assert first == delimiter.join(["id", "query", "reference", "failure", "error"])


def test_newlines_in_names_are_no_ends_of_rows_wherever_arrow_s_blocks_meet(tmp_path):
    pairs = [("a\n" * 50, f"{i}\n,b") for i in range(12000)]  # more than a block of 1 MiB
    table = pa.concat_tables(_pairs._read_pairs(write(tmp_path / "pairs.csv", pairs)))
    assert list(zip(table["query"].to_pylist(), table["reference"].to_pylist())) == pairs


@given(st.lists(st.integers(0, 7)), st.integers(1, 5))
def test_parts_are_of_one_size_but_for_the_last(sizes, rows):
    ends = np.cumsum([0, *sizes])
    tables = [pa.table({"row": pa.array(range(*both), pa.int64())}) for both in pairwise(ends)]
    found = [part["row"].to_pylist() for part in _pairs._in_parts(tables, rows)]
    everything = list(range(sum(sizes)))
    assert found == [everything[i : i + rows] for i in range(0, len(everything), rows)]


@posix
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_pairs_and_weights_and_embeddings_that_are_no_files_do_not_wait(tmp_path, run, kind):
    file = tmp_path / "pairs.csv"
    {"pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](file)
    good = write(tmp_path / "good.csv", SIX)
    for arguments in ([file], [good, "--weights", file], [good, "--reference-embeddings", file]):
        if kind == "folder" and arguments == [file]:  # of images
            continue
        status, _, err = run(*arguments, "-o", tmp_path / "out")
        assert status == 2
        assert f"there is no file {file}: it is a {kind}" in err
    status, _, err = run(good, "--root", file, "-o", tmp_path / "out")
    assert (status, "there is no folder" in err) == ((2, True) if kind != "folder" else (2, False))
    assert not (tmp_path / "out").exists() or kind == "folder"


def valid(suffix):
    columns = {"id": [1, 2, 3], "query": ["a", None, "b"], "reference": ["c", "d", "e"]}
    if suffix == ".csv":
        return b'id,query,reference\n1,a,b\n2,"c\nd",\n3,e,f\n'
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue().to_pybytes()


VALID = {suffix: valid(suffix) for suffix in (".csv", ".parquet")}


@given(st.sampled_from([".csv", ".parquet"]), st.data())
def test_whatever_bytes_a_file_holds_it_is_pairs_or_an_error_that_names_it(tmp_path_factory, suffix, data):
    content = bytearray(VALID[suffix])
    changes = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
    for place, byte in data.draw(changes):
        content[place] = byte
    content = data.draw(st.sampled_from([content, b""])) + data.draw(st.binary(max_size=20))
    path = tmp_path_factory.getbasetemp() / f"hostile{suffix}"
    path.write_bytes(content)
    found = ""
    try:
        for table in _pairs._read_pairs(path):
            table.to_pylist()
    except ValueError as error:
        found = str(error)
    assert not found or str(path) in found


# Names and warnings in rows


@posix
def test_under_a_root_that_is_no_utf8_a_missing_image_costs_its_own_row(photos, tmp_path, run):
    root = tmp_path / os.fsdecode(b"\xff\x1b[2J")
    shutil.copytree(photos, root)
    arguments = (write(tmp_path / "pairs.csv", SIX), "-o", tmp_path / "out", "--root", root)
    for _ in range(2):  # finished, it is recognised
        status, out, err = run(*arguments)
        assert (status, err) == (1, "")
        image = f"{tmp_path}/\\udcff\\x1b[2J/nope.jpg"
        assert f"explained 5 pairs, 1 failed (1 no such file); the first: there is no image {image}" in out
    assert [row["error"] is None for row in read(tmp_path / "out")] == [True] * 5 + [False]
    status, _, err = run(*arguments[:-1], photos)
    assert (status, err.count("\n")) == (2, 1)
    assert "holds a job of other root" in err
    assert "\x1b" not in err


@posix
def test_a_pipe_as_an_image_costs_its_own_rows(photos, tmp_path, run):
    os.mkfifo(tmp_path / "pipe.png")
    pairs = write(tmp_path / "pairs.csv", [*SIX[:2], (str(tmp_path / "pipe.png"), NAMES[0]), ("/dev/zero", NAMES[0])])
    status, out, _ = run(pairs, "-o", tmp_path / "out", "--root", photos)
    assert status == 1
    assert "explained 2 pairs, 2 failed (2 cannot be read)" in out
    assert ["it is a pipe" in (row["error"] or "") for row in read(tmp_path / "out")] == [False, False, True, False]


def test_a_warning_of_pillow_is_said_once_with_a_file(photos, tmp_path, run):
    paths = [str(damaged(tmp_path / f"{i}.jpg")) for i in range(4)]
    pairs = write(tmp_path / "pairs.csv", [(path, NAMES[0]) for path in paths])
    status, _, err = run(pairs, "-o", tmp_path / "out", "--root", photos, "--part-size", 2)
    assert status == 0
    assert err.count("\n") == 1
    assert "Corrupt EXIF data" in err
    assert sum(f"({path}, for one)" in err for path in paths) == 1


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(0, 1), (3, 1), (2**-3, 1), (2**-3 - 2**-9, 2**-4), (2**15, 1), (2**15 + 2**5, 2**15), (3 * 2**20, 2**21)],
)
def test_values_are_scaled_where_half_precision_would_lose_them_and_nowhere_else(largest, scale):
    values = np.array([[largest, -largest / 4]], np.float32)
    half, found = _work.half(values)
    assert half.dtype == np.float16
    assert found == scale
    np.testing.assert_array_equal(half.astype(np.float32) * np.float32(found), values)


@pytest.mark.parametrize("layers", ["ab", "ba"])
def test_parts_of_two_layers_are_refused_whichever_comes_first(tmp_path, layers):
    table = pa.table({"id": [0]})
    for part, layer in enumerate(layers):
        _part.write_part(_part.part_file(tmp_path, part), table, layer, "job", part)
    with pytest.raises(
        ValueError, match=rf"part-000000.parquet is of layer {layers[0]}, but .* of {layers[1]}: delete"
    ):
        _part.layers_of(tmp_path, range(2), "job")
