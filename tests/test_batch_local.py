"""The local engine: this process is the first worker; and how many pairs a part has if nobody says."""

# ruff: noqa: F811  # fixtures of other tests

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_batch import PAIRS, contents, photos, write  # noqa: F401
from test_batch_options import SIZE, small  # noqa: F401

pa = pytest.importorskip("pyarrow")
from captum_fam import batch  # noqa: E402  # after the skip
from captum_fam.batch import _local, _pairs, read_maps  # noqa: E402


def explain(photos, out="out", pairs=PAIRS, **options):
    options = {"encoder": "batch_small:small", "size": SIZE, "root": photos, "workers": 1} | options
    return batch.explain_pairs(write(Path("pairs.csv"), pairs), Path(out), **options)


@contextmanager
def double():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": double,
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_what_the_caller_has_set_in_torch_changes_no_file_and_stays(photos, tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    for name, context in (("plain", nullcontext), ("set", setting)):
        with context():
            before = state()
            explain(photos, name, PAIRS[:2], encoder="bundled", layer="features", method="RelevanceCam", size=32)
            assert state() == before
    assert contents(tmp_path / "set") == contents(tmp_path / "plain")


def state():
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


def test_one_worker_starts_no_process(photos, small, monkeypatch):
    monkeypatch.setattr(_local, "ProcessPoolExecutor", None)
    assert explain(photos, part_size=4).explained == len(PAIRS)
    with pytest.raises(TypeError):
        explain(photos, "others", part_size=4, workers=2)


def test_one_part_starts_no_process(photos, small, monkeypatch):
    explain(photos, part_size=4)
    Path("out/part-000003.parquet").unlink()
    monkeypatch.setattr(_local, "ProcessPoolExecutor", None)
    assert explain(photos, part_size=4, workers=2).explained == len(PAIRS)


# The size of parts


def tables(*sizes):
    return [pa.table({"query": pa.array(range(size))}) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((3,), 64),
        ((1024,), 64),
        ((1025,), 65),
        ((1000, 1000), 125),
        ((8191,), 512),
        ((8175,), 511),
        ((8192,), 512),
        ((5000, 5000, 5000), 512),
        ((), 64),
    ],
    ids=str,
)
def test_a_short_list_has_sixteen_parts_of_at_least_64_pairs(sizes, expected):
    given = tables(*sizes)
    size, then = _pairs._sized(iter(given), None)
    assert size == expected
    assert [len(table) for table in then] == [len(table) for table in given]
    assert _pairs._sized(given, 7)[0] == 7


@given(st.lists(st.integers(1, 40), max_size=8))
def test_without_a_size_every_pair_has_its_place(sizes):
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(_pairs, "_LEAST", 2)
        patch.setattr(_pairs, "_MOST", 5)
        sink = pa.BufferOutputStream()
        total, size = _pairs.write_tables(iter(tables(*sizes)), sink, None)
    assert total == sum(sizes)
    assert size == min(5, max(2, -(-total // 16)))
    if total:
        file = pa.ipc.open_file(sink.getvalue())
        parts = [file.get_batch(i) for i in range(file.num_record_batches)]
        assert [len(part) for part in parts] == [size] * (total // size) + [total % size] * (total % size > 0)
        assert [row for part in parts for row in part["id"].to_pylist()] == list(range(total))


def test_a_job_keeps_the_size_that_it_found_and_is_read_by_it(photos, small, monkeypatch):
    monkeypatch.setattr(_pairs, "_LEAST", 2)
    explain(photos)
    assert json.loads(Path("out/_batch.json").read_text())["part_size"] == 2
    assert len(list(Path("out").glob("part-*"))) == 13
    Path("out/part-000004.parquet").unlink()
    monkeypatch.setattr(_pairs, "_LEAST", 64)  # it is not found anew
    assert explain(photos).explained == 25
    assert [(pair.query, pair.reference) for pair in read_maps("out")] == PAIRS
    with pytest.raises(ValueError, match=r"a job of other part_size \(None then\)"):
        explain(photos, part_size=2)
