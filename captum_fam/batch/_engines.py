"""The engines that explain parts. They take parts, and yield the results of PartExplainer in any order."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from captum_fam.batch._local import cpus, locally
from captum_fam.batch._part import PartExplainer, Warned
from captum_fam.encoders import one_line

LIVES = 3  # how many workers of Ray may die with a part, as nodes come and go, before the part is taken for the cause


def _on_ray(left: list[int], options: dict[str, Any], workers: int | None, parts: int) -> Iterator[tuple[int, Warned]]:
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"cannot import {error.name}: pip install 'captum-fam[ray]'") from error

    gpus = int(options["device"].startswith("cuda"))
    mine = not ray.is_initialized()
    try:
        if mine:
            _start_ray(ray)
        there, kind = ray.cluster_resources(), "GPU" if gpus else "CPU"
        workers = min(workers or int(there.get(kind, 0)), parts)
        if not workers:
            raise ValueError(f"Ray has no {kind}: pass {'--device cpu, or ' * gpus}--workers if it can get some")
        options = options | {"threads": max(1, int(there.get("CPU", 1)) // workers)}
        worker = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")(_RayExplainer)
        yield from _by_actors(ray, lambda: worker.remote(options), left, min(workers, len(left)))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from error
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"Ray ended the job ({_first(error)}): start again, which finishes what is left, with a smaller"
            " --batch-size if memory ran out, or pass --engine local"
        ) from error
    finally:
        if mine:
            ray.shutdown()


def _by_actors(ray: Any, begin: Callable[[], Any], left: list[int], workers: int) -> Iterator[tuple[int, Warned]]:
    """
    A part's file is written whole or not at all. So if a worker is lost, perhaps with its node, its
    part goes to another worker. It does no harm if the first worker was only cut off and goes on.
    Ray's own retries are not used: they have no end, or count its attempts to reach a node.
    """
    left, lost = left[::-1], Counter[int | None]()
    busy: dict[
        Any, tuple[Any, int | None]
    ] = {}  # None: the worker starts, and holds no part while Ray has no place for it

    def start() -> None:
        actor = begin()
        busy[actor.ready.remote()] = actor, None

    for _ in range(workers):
        start()
    try:
        while left or any(part is not None for _, part in busy.values()):
            [done], _ = ray.wait(list(busy))
            actor, part = busy.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError:
                lost[part] += 1
                if lost[part] == LIVES * (workers if part is None else 1):
                    raise
                if part is not None:
                    left.append(part)
                start()
                continue
            if part is not None:
                yield found
            lost[None] = 0
            if left:
                part = left.pop()
                busy[actor.explain.remote(part)] = actor, part
    finally:  # at once, as above
        for actor, _ in busy.values():
            ray.kill(actor)


def _start_ray(ray: Any) -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # its time limits for a start are fixed, and their errors have no class of their own
        raise ValueError(
            f"Ray did not start ({_first(error)}), as on a busy machine or where no cluster answers at RAY_ADDRESS:"
            " start again, or pass --engine local"
        ) from error


def _first(error: Exception) -> str:
    """The first line of an error; the rest is a traceback, or the logs of Ray."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _RayExplainer:
    """A PartExplainer as an actor of Ray."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.explainer = PartExplainer(**options | {"threads": min(options["threads"], cpus())})  # of this node

    def ready(self) -> None:
        pass

    def explain(self, part: int) -> tuple[int, Warned]:
        try:
            return self.explainer(part)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(one_line(error)) from error


ENGINES: dict[str, Callable[..., Iterator[tuple[int, Warned]]]] = {"local": locally, "ray": _on_ray}
