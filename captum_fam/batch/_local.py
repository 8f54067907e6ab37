"""The local engine: this process explains parts while worker processes start, and goes on beside them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from captum_fam._files import recorded_warnings
from captum_fam.batch._part import PartExplainer, Warned

_Done: TypeAlias = tuple[int, Warned]


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def locally(left: list[int], options: dict[str, Any], workers: int | None, parts: int) -> Iterator[_Done]:
    """This process is the first worker, because others take seconds to start; all take one part after another."""
    one_each = torch.cuda.device_count() if options["device"] == "cuda" else cpus() if options["device"] == "cpu" else 1
    workers = min(workers or one_each or 1, parts)
    options = options | {"threads": max(1, cpus() // workers)}
    explain, todo = PartExplainer(**_on_a_gpu(options, 0)), deque(left)
    with _processes(min(workers, len(left)) - 1, options, todo) as done:
        for _ in left:
            part = _next(todo) if done.empty() else None
            if part is None:
                yield done.get().result()
            else:
                with _as_in_a_process(options):
                    found = explain(part)
                yield found


def _next(todo: deque[int]) -> int | None:
    """The next part; may be called in any thread."""
    try:
        return todo.popleft()
    except IndexError:
        return None


@contextmanager
def _processes(count: int, options: dict[str, Any], todo: deque[int]) -> Iterator["SimpleQueue[Future[_Done]]"]:
    """
    Yields the results of parts from ``count`` processes. Each takes the next part when it is done
    with one, and its first when it has loaded the encoder. Until then, this process may be done
    with all.
    """
    done: SimpleQueue[Future[_Done]] = SimpleQueue()
    if not count:
        yield done
        return
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()

    def loaded(future: Future[None]) -> None:
        if error := future.exception():
            failed: Future[_Done] = Future()
            failed.set_exception(error)
            done.put(failed)
        else:
            submit()

    def finished(future: Future[_Done]) -> None:
        done.put(future)
        if not future.exception():
            submit()

    def submit() -> None:
        if (part := _next(todo)) is not None:
            with suppress(RuntimeError):  # the job has ended
                pool.submit(_work, part).add_done_callback(finished)

    with ProcessPoolExecutor(count, context, _start, (options, context.Value("i", 1))) as pool:
        try:
            with _deaf_to_interrupts():  # for the processes that this starts, which we end ourselves
                for _ in range(count):
                    pool.submit(_load).add_done_callback(loaded)
            yield done
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process died, as one does that runs out of memory: start again, which finishes what is left,"
                " with fewer --workers or a smaller --batch-size"
            ) from error
        finally:  # at once, whatever they do: a part is written whole or not at all
            todo.clear()
            for process in set(multiprocessing.active_children()).difference(others):
                process.kill()


@contextmanager
def _as_in_a_process(options: dict[str, Any]) -> Iterator[None]:
    """Within the context, the caller's settings of torch change no map; they are restored afterwards."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(options["threads"])
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_a_gpu(options: dict[str, Any], worker: int) -> dict[str, Any]:
    """The options with a GPU for this worker: its own, if there are enough."""
    if options["device"] != "cuda" or not torch.cuda.device_count():
        return options
    return options | {"device": f"cuda:{worker % torch.cuda.device_count()}"}


_explainer: PartExplainer


def _start(options: dict[str, Any], started: Any) -> None:
    """Called when a worker process starts."""
    global _explainer
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # not its own of processes: whoever kills us would leave a semaphore behind
    with started.get_lock():
        worker = started.value
        started.value += 1
    _explainer = PartExplainer(**_on_a_gpu(options, worker))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _load() -> None:
    with recorded_warnings():  # they come from the first worker
        _explainer.load()


def _work(part: int) -> _Done:
    return _explainer(part)
