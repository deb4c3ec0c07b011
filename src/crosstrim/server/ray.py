"""The server on a Ray cluster: the same application, in as many replicas as wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from crosstrim.batch.ray import import_ray, refusal, start
from crosstrim.errors import EngineError
from crosstrim.server.local import url
from crosstrim.server.settings import Settings

_NAME = "crosstrim"
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_GRACE_SECONDS = 5  # beyond the time that a request may take, until a replica that goes is no longer waited for
_SERVICES: list[Any] = []  # of a replica's process, for its health check
_BEYOND_THE_QUEUE = 16  # requests that reach a replica to be refused there, in OpenAI's shape


def serve_on_ray(
    settings: Settings,
    host: str,
    port: int,
    ready: Callable[[str], None],
    *,
    replicas: int = 1,
    address: str | None = None,
    wait: Callable[[], Any] = lambda: time.sleep(1),
) -> None:
    """Serve the model by Ray Serve until interrupted. The limits of `settings` hold for each replica.

    Args:
        settings: what to serve.
        host: the address that every node's proxy listens on.
        port: the port.
        ready: called with the server's URL once the replicas are up.
        replicas: how many models; each takes a GPU where the cluster has some and the device is not the CPU.
        address: of a running cluster; None starts one on this machine.
        wait: called again and again while serving.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: the cluster cannot be reached, or the replicas do not start.
    """
    ray = import_ray("ray.serve")
    was_running = ray.is_initialized()
    try:
        if not was_running:
            start(ray, address)
        ray.serve.start(http_options={"host": host, "port": port})
        _deploy(ray, _application(ray, settings, replicas))
        ready(url(host, port))
        while True:
            wait()
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise refusal(error) from error
    finally:
        if ray.is_initialized():
            ray.serve.delete(_NAME)
            if address is None and not was_running:
                ray.serve.shutdown()  # elsewhere it would end what others serve
        if not was_running:
            ray.shutdown()


def _deploy(ray: Any, application: Any) -> None:
    try:
        ray.serve.run(application, name=_NAME, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as error:
        # The error itself does not say what the replicas raised.
        found = ray.serve.status().applications[_NAME].deployments.values()
        raise refusal(RuntimeError("\n".join([*(one.message for one in found), str(error)]))) from error


def check(services: Sequence[Any]) -> None:
    """Refuse to be well when a model works no more.

    Raises:
        EngineError: the thread that owns a model ended.
    """
    for service in services:
        if service.failure is not None:
            raise EngineError("the thread that owns the model ended; this replica must go.") from service.failure


def _application(ray: Any, settings: Settings, replicas: int) -> Any:
    on_gpu = settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0

    def build_app() -> Any:
        """Run in the replica."""
        from crosstrim.asking.loading import load
        from crosstrim.server import ray as here  # this module of the replica's process; Ray copies the function
        from crosstrim.server.app import build
        from crosstrim.server.log import lines
        from crosstrim.server.service import Service

        loaded = load(
            settings.model,
            dtype=settings.dtype,
            device_map=settings.device or ("cuda" if on_gpu else None),
            quantization=settings.quantization,
        )
        lines(settings.log).__enter__()  # as long as the process
        service = Service(*loaded, settings)
        here._SERVICES.append(service)
        return build(service, settings)

    class Replica:
        """One model, behind the application that `build_app` makes."""

        def check_health(self) -> None:
            """Called by Ray, which puts another replica in the place of one that raises."""
            from crosstrim.server import ray as here

            here.check(here._SERVICES)

    deployment = ray.serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=settings.queue_limit + _BEYOND_THE_QUEUE,
        graceful_shutdown_timeout_s=settings.timeout + _GRACE_SECONDS,
        ray_actor_options={"num_gpus": 1 if on_gpu else 0},
    )
    return deployment(ray.serve.ingress(build_app)(Replica)).bind()
