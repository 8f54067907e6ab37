"""The batch job on Ray: nodes that are lost, workers that die, and what is said of it."""

# ruff: noqa: F811  # fixtures of other tests

import subprocess
import sys
import tempfile
import types
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batch import (  # noqa: F401
    ENVIRONMENT,
    JOB,
    PAIRS,
    PARTS,
    contents,
    in_process,
    job,
    linux,
    living,
    photos,
    run,
    start,
    undisturbed,
    until,
    write,
)

pytest.importorskip("pyarrow")
from captum_fam.batch import _engines, read_maps  # after the skip

# Without Ray


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


DIED = RayError("The actor died.\nTraceback (most recent call last):")


class FakeRay(types.ModuleType):
    """
    Ray where no Ray need start. ``choose`` picks what has ended, by the numbers of the workers, and ``ends`` says what
    comes of it: an error to raise, or None.
    """

    def __init__(self, start=None, resources=None, choose=min, ends=lambda worker, part: None, users=False):
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.start, self.resources, self.choose, self.ends = start, resources or {"CPU": 2}, choose, ends
        self.users, self.down = users, 0
        self.begun, self.waiting, self.killed, self.given = 0, {}, [], []

    def is_initialized(self):
        return self.users

    def init(self, **_):
        if self.start:
            raise self.start

    def shutdown(self):
        self.down += 1

    def cluster_resources(self):
        return self.resources

    def remote(self, **asked):
        self.asked = asked
        return lambda kind: types.SimpleNamespace(remote=lambda options: self.begin(kind(options)))

    def begin(self, made=None):
        worker, self.begun = self.begun, self.begun + 1

        def call(part=None):
            assert worker not in self.waiting  # one thing at a time
            self.waiting[worker] = part, made
            return worker

        explain = types.SimpleNamespace(remote=call)
        return types.SimpleNamespace(worker=worker, ready=explain, explain=explain)

    def wait(self, workers):
        assert sorted(workers) == sorted(self.waiting)
        done = self.choose(workers)
        return [done], [worker for worker in workers if worker != done]

    def get(self, worker):
        part, made = self.waiting.pop(worker)
        self.given.append(part)
        if error := self.ends(worker, part):
            raise error
        if made is None or part is None:
            return part
        try:
            return made.explain(part)
        except Exception as error:
            failed = RayTaskError("Traceback (most recent call last):")
            failed.cause = error
            raise failed from None

    def kill(self, actor):
        self.killed.append(actor.worker)


def explained(ray, parts, workers):
    return _engines._by_actors(ray, ray.begin, parts, workers)


@given(st.lists(st.integers(0, 99), unique=True, min_size=1, max_size=9), st.integers(1, 4), st.data())
def test_whichever_workers_are_lost_each_part_is_explained_and_counted_once(parts, workers, data):
    deaths = Counter()
    no_place = data.draw(st.sets(st.integers(0, workers - 1), max_size=workers - 1))

    def choose(running):
        return data.draw(st.sampled_from([worker for worker in running if worker not in no_place]))

    def ends(worker, part):
        lost = deaths[part] < _engines.LIVES - 1 and data.draw(st.booleans())
        deaths[part] = deaths[part] + 1 if lost else 0
        return DIED if lost else None

    ray = FakeRay(choose=choose, ends=ends)
    assert sorted(explained(ray, parts, workers)) == sorted(parts)
    assert sorted(ray.killed) == sorted(ray.waiting)
    assert no_place <= {*ray.waiting}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_part_that_kills_each_worker_ends_the_job_after_three(workers):
    ray = FakeRay(choose=max, ends=lambda worker, part: DIED if part == 5 else None)
    with pytest.raises(RayError, match="The actor died"):
        list(explained(ray, [4, 5, 6], workers))
    assert Counter(ray.given)[5] == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_that_never_start_end_the_job(workers):
    ray = FakeRay(ends=lambda worker, part: DIED)
    with pytest.raises(RayError, match="The actor died"):
        list(explained(ray, [4, 5, 6], workers))
    assert ray.given == [None] * 3 * workers


@pytest.fixture
def by_fake(run, photos, tmp_path, monkeypatch):
    """The command with such a Ray."""

    def by_fake(ray, *options):
        monkeypatch.setitem(sys.modules, "ray", ray)
        pairs = write(tmp_path / "pairs.csv", [*PAIRS[:2], ("nope.jpg", PAIRS[0][0])])
        return run(pairs, "-o", tmp_path / "out", "--root", photos, "--engine", "ray", "--part-size", 2, *options)

    return by_fake


def test_ray_gives_the_files_of_the_local_engine(by_fake, run, photos, tmp_path):
    ray = FakeRay()
    status, out, err = by_fake(ray)
    assert (status, ray.begun, ray.down) == (1, 2, 1), err  # one worker for each part
    assert "explained 2 pairs, 1 failed" in out
    assert ray.asked == {"num_cpus": 1, "num_gpus": 0, "scheduling_strategy": "SPREAD"}
    assert run(tmp_path / "pairs.csv", "-o", tmp_path / "local", "--root", photos, "--part-size", 2)[0] == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    (tmp_path / "out" / "part-000001.parquet").unlink()
    ray = FakeRay(users=True)
    assert by_fake(ray)[0] == 1
    assert (ray.given, ray.begun, ray.down) == ([None, 1], 1, 0)  # what is left, and who started Ray keeps it


class CutOff(FakeRay):
    """The first worker of each part does its work, but nobody hears of it."""

    def get(self, worker):
        part, _ = self.waiting[worker]
        found = super().get(worker)
        if part is not None and self.given.count(part) == 1:
            raise DIED
        return found


def test_a_worker_that_is_only_cut_off_does_no_harm(by_fake, run, photos, tmp_path):
    ray = CutOff()
    status, out, err = by_fake(ray)
    assert (status, ray.begun) == (1, 4), err
    assert "explained 2 pairs, 1 failed" in out
    assert run(tmp_path / "pairs.csv", "-o", tmp_path / "local", "--root", photos, "--part-size", 2)[0] == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize(("cluster", "node", "threads"), [(8, 8, 2), (8, 1, 1), (3, 8, 1)])
def test_a_worker_takes_its_share_of_the_cluster_but_no_more_than_its_node_has(
    by_fake, monkeypatch, cluster, node, threads
):
    taken = []

    def explain(self, part):
        taken.append(self.threads)
        raise ValueError("That is enough.")

    monkeypatch.setattr(_engines, "cpus", lambda: node)
    monkeypatch.setattr(_engines.PartExplainer, "__call__", explain)
    by_fake(FakeRay(resources={"CPU": cluster}), "--part-size", 1, "--workers", 4)
    assert taken == [threads]


@pytest.mark.parametrize(
    ("ray", "options", "words"),
    [
        (
            {"start": Exception("The current node timed out during startup. This could happen because.\nlogs")},
            (),
            "Ray did not start (Exception: The current node timed out during startup. This could happen because.)",
        ),
        (
            {"ends": lambda worker, part: DIED},
            (),
            "Ray ended the job (RayError: The actor died.): start again, which finishes what is left",
        ),
        ({}, ("--layer", "feature"), "the encoder has no layer 'feature': did you mean features"),
        ({"resources": {"GPU": 1}}, (), "Ray has no CPU: pass --workers if it can get some"),
        ({}, ("--device", "cuda"), "Ray has no GPU: pass --device cpu, or --workers if it can get some"),
    ],
    ids=["start", "end", "layer", "CPU", "GPU"],
)
def test_what_goes_wrong_on_ray_is_one_line(by_fake, ray, options, words):
    ray = FakeRay(**ray)
    status, out, err = by_fake(ray, *options)
    assert (status, out, err.count("\n"), ray.down) == (2, "", 1, 1)
    assert err.startswith(f"captum-fam: {words}")


def test_an_error_of_another_kind_is_that_of_a_worker(by_fake, monkeypatch):
    def broken(self, part):
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr(_engines.PartExplainer, "__call__", broken)
    assert by_fake(FakeRay())[2] == "captum-fam: RuntimeError: a bug of two lines\n"


# With Ray


def by_ray(job, output, *arguments):
    """What the command says, once Ray starts: on a busy machine it may not, within limits that are its own."""
    for _ in range(3):
        process = start(job, output, "--engine", "ray", *arguments)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err
        if "Ray did not start" not in err:
            return process.returncode, out, err
    pytest.skip("Ray does not start on this machine")


def test_ray_writes_the_same_files(job, undisturbed, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra ray")
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):  # of the cluster below
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)
    status, out, err = by_ray(job, tmp_path / "out")
    assert status == 1, err
    assert "explained 39 pairs, 1 failed" in out
    assert contents(tmp_path / "out") == undisturbed[0]


# A cluster in processes: a head without CPUs, to which jobs connect, and nodes with one each. It reads what to do.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick})
nodes = [cluster.add_node(), cluster.add_node()]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    else:
        nodes.append(cluster.add_node())
    print(line, end="", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """What sends it a line and waits until that is done."""
    pytest.importorskip("ray", reason="needs the extra ray")
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as monkeypatch:
        # a short name: those of sockets are limited
        monkeypatch.setitem(ENVIRONMENT, "RAY_TMPDIR", folder)
        with subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as process:
            address = process.stdout.readline().strip()
            if not address:
                pytest.skip("Ray does not start on this machine")
            monkeypatch.setitem(ENVIRONMENT, "RAY_ADDRESS", address)

            def tell(what):
                process.stdin.write(f"{what}\n")
                process.stdin.flush()
                assert process.stdout.readline() == f"{what}\n"

            yield tell
            process.stdin.close()
            process.stdout.read()


@linux
def test_nodes_that_are_killed_cost_no_pair_and_none_comes_twice(cluster, job, undisturbed, tmp_path):
    output = tmp_path / "out"

    def parts():
        return len(list(output.glob("part-*")))

    process = start(job, output, "--engine", "ray")
    assert until(parts)
    cluster("kill")
    before = parts()
    assert before < PARTS - 1
    assert until(lambda: parts() > before)  # the other goes on
    cluster("kill")
    assert parts() < PARTS
    assert process.poll() is None  # it waits for a node, as Ray does
    cluster("add")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "explained 39 pairs, 1 failed" in out
    assert contents(output) == undisturbed[0]
    assert [(pair.id, pair.query, pair.reference) for pair in read_maps(output)] == [
        (f"{i:02}", query, reference) for i, (query, reference) in enumerate(JOB)
    ]
    assert not list(output.glob("_tmp*"))
    assert until(lambda: not living(process.pid), 20)


def test_an_encoder_that_no_worker_of_a_cluster_can_load_is_one_line(cluster, job, tmp_path):
    status, out, err = by_ray(job, tmp_path / "out", "--layer", "feature")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("captum-fam: the encoder has no layer 'feature': did you mean features")
