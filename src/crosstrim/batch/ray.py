"""Batch jobs on a Ray cluster: Ray Data hands batches to actors that load the model once."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from crosstrim.batch.answerer import Answered, Answerer, Job
from crosstrim.errors import EngineError, MissingExtraError


def answer_on_ray(
    job: Job, pending: Sequence[int], *, address: str | None = None, workers: int = 1
) -> Iterator[tuple[int, list[Answered]]]:
    """Answer batches on a Ray cluster, in the order in which they get done.

    Every node must see the rows' file, the pictures and the model under the same paths, and have this crosstrim.
    Where the cluster has GPUs and the job's device is not the CPU, every worker takes one.

    Args:
        job: what to ask.
        pending: numbers of the batches.
        address: of a running cluster; None starts one on this machine, for the length of the job.
        workers: how many actors, each with a model of its own.

    Yields:
        The number of a batch and its rows' answers.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: the cluster cannot be reached or gave up, or a worker refused the job.
    """
    ray = import_ray("ray.data")
    was_running = ray.is_initialized()
    try:
        if not was_running:
            start(ray, address)
        yield from _answer(ray, job, pending, workers)
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise refusal(error) from error
    finally:
        if not was_running:
            ray.shutdown()


def import_ray(module: str) -> Any:
    """Ray, with one of its libraries.

    Raises:
        MissingExtraError: it is not installed.
    """
    import importlib

    try:
        importlib.import_module(module)
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtraError(
            "the engine ray needs Ray, which is not installed: pip install 'crosstrim[ray]'."
        ) from error


def start(ray: Any, address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine, without its chatter."""
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they would say is raised as well
    ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False)


def _answer(ray: Any, job: Job, pending: Sequence[int], workers: int) -> Iterator[tuple[int, list[Answered]]]:
    on_gpu = job.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    ray.data.DataContext.get_current().enable_progress_bars = False  # the driver draws its own
    numbers = ray.data.from_items([{"batch": batch} for batch in pending], override_num_blocks=len(pending))
    answered = numbers.map_batches(
        _Worker,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(pending))),
        num_gpus=1 if on_gpu else 0,
    )
    for block in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in block.to_pylist():
            yield row["batch"], json.loads(row["rows"])


class _Worker:
    """An actor with one model."""

    def __init__(self, job: Job) -> None:
        self._answerer = Answerer(job)

    def __call__(self, numbers: dict[str, Any]) -> dict[str, list[Any]]:
        batches = [int(batch) for batch in numbers["batch"]]
        return {"batch": batches, "rows": [json.dumps(self._answerer.answer(batch)) for batch in batches]}


def refusal(error: Exception) -> EngineError:
    """What a worker refused in crosstrim's words, which Ray hands on inside of a traceback, or that Ray gave up."""
    words = re.findall(r"crosstrim\.errors\.\w+: (.+)", str(error))
    if words:
        return EngineError(f"a worker on the Ray cluster refused: {words[-1].strip()}")
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return EngineError(f"Ray gave up: {last}; look into its logs, or take --engine local.")
