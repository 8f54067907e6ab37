"""Where parts are explained: parts in, the counts and warnings of PartExplainer out, in any order."""

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from captum_fam.batch._part import PartExplainer, Warned
from captum_fam.encoders import one_line


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _locally(left: list[int], options: dict[str, Any], workers: int | None, parts: int) -> Iterator[tuple[int, Warned]]:
    one_each = (
        torch.cuda.device_count() if options["device"] == "cuda" else _cpus() if options["device"] == "cpu" else 1
    )
    workers = min(workers or one_each or 1, parts)
    context = multiprocessing.get_context("spawn")
    options = options | {"threads": max(1, _cpus() // workers)}
    futures: set[Future[tuple[int, Warned]]] = set()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _start, (options, context.Value("i"))) as pool:
        try:
            for part in left:
                if len(futures) == 2 * workers:  # a billion would not fit
                    done, futures = wait(futures, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                with _deaf_to_interrupts():  # for the processes that this may start: we end them
                    futures.add(pool.submit(_work, part))
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process died, as one does that runs out of memory: start again, which finishes what is left,"
                " with fewer --workers or a smaller --batch-size"
            ) from error
        finally:  # at once, whatever they are doing: parts are whole or not there
            for process in set(multiprocessing.active_children()).difference(others):
                process.kill()


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


_explainer: PartExplainer


def _start(options: dict[str, Any], started: Any) -> None:
    """In a worker process."""
    global _explainer
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # not its own of processes: whoever kills us would leave a semaphore behind
    if options["device"] == "cuda" and torch.cuda.device_count():
        with started.get_lock():
            options = options | {"device": f"cuda:{started.value % torch.cuda.device_count()}"}
            started.value += 1
    _explainer = PartExplainer(**options)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(part: int) -> tuple[int, Warned]:
    return _explainer(part)


def _on_ray(left: list[int], options: dict[str, Any], workers: int | None, parts: int) -> Iterator[tuple[int, Warned]]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"cannot import {error.name}: pip install 'captum-fam[ray]'") from error

    gpus = int(options["device"].startswith("cuda"))
    mine = not ray.is_initialized()
    try:
        if mine:
            _start_ray(ray)
        there = ray.cluster_resources()
        workers = min(workers or int(there.get("GPU" if gpus else "CPU", 0)), parts)
        if not workers:
            raise ValueError("Ray has no GPU: pass --device cpu, or --workers if it can get some")
        options = options | {"threads": max(1, int(there.get("CPU", 1)) // workers)}
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items([{"part": part} for part in left], override_num_blocks=min(len(left), 64 * workers))
        done = rows.map_batches(
            _RayExplainer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
            fn_constructor_kwargs=options,
        )
        failed = ""
        for row in done.iter_rows():  # to the end: Ray may end this process if it is shut down while rows come
            failed = failed or row["error"]
            yield row["pairs"], json.loads(row["warned"])
        if failed:
            raise ValueError(failed)
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"Ray ended the job ({_first(error)}): start again, which finishes what is left, or pass --engine local"
        ) from error
    finally:
        if mine:
            ray.shutdown()


def _start_ray(ray: Any) -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # its time limits for a start are fixed, and their errors of no kind of their own
        raise ValueError(
            f"Ray did not start ({_first(error)}), as on a busy machine: start again when it is less so, or pass"
            " --engine local"
        ) from error


def _first(error: Exception) -> str:
    """The rest is a traceback, or the logs of Ray."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _RayExplainer:
    """
    A PartExplainer in the words of Ray Data. An error is a value, for Ray would log it with its traceback, and the last
    that it does.
    """

    def __init__(self, **options: Any) -> None:
        self.explain, self.error = PartExplainer(**options), ""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        pairs, warned = 0, Warned()
        if not self.error:
            try:
                pairs, warned = self.explain(int(batch["part"][0]))
            except Exception as error:
                self.error = str(error) if isinstance(error, ValueError) else one_line(error)
        return {"pairs": [pairs], "warned": [json.dumps(warned)], "error": [self.error]}


ENGINES: dict[str, Callable[..., Iterator[tuple[int, Warned]]]] = {"local": _locally, "ray": _on_ray}
