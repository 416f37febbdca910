"""Fleet: replicas of the engine under Ray Serve, on one machine or several, as a Source of one server.

APIs, keys, ledger, files and what is remembered of conversations stay in the server's process; replicas only compute.
Which of them gets a prompt is decided by `routing`, in the router that Ray Serve lets a deployment bring along.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from hadal import device as devices
from hadal.llm import LLM
from hadal.server.ask import Ask
from hadal.server.backend import LocalBackend, failure
from hadal.server.errors import APIError
from hadal.server.remote import Job, Piece
from hadal.server.routing import Routes, marks

_LOCAL = not os.environ.get("RAY_ADDRESS")
if _LOCAL:  # before Ray is loaded, which reads it then: the ports of a cluster without a token run anything for anybody
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402
from ray.serve.exceptions import RayServeException  # noqa: E402
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica  # noqa: E402

_APP = "hadal"
_TRIES = 5  # of a request whose replica goes before it has told anything
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_ROLL_SECONDS = 3600.0  # that a replica which is replaced has for its answers
_log = logging.getLogger("hadal.server")

MakeLLM = Callable[[int], LLM]  # of the replica with this number


class FleetError(ValueError):
    """Replicas that cannot be started; the message names the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class LoadReplica:
    """Makes a replica's model; replicas of one machine divide its memory and a folder for prefixes among them."""

    model: str
    options: Mapping[str, Any]
    replicas: int

    def __call__(self, number: int) -> LLM:
        """The LLM of the replica `number`."""
        own = dict(self.options)
        if (folder := own.get("prefix_folder")) is not None:
            own["prefix_folder"] = folder / f"replica-{number}"
        where = devices.resolve(own.get("device", "auto"))
        if own.get("cache_memory") is None and _LOCAL and where.type == "cpu":
            own["cache_memory"] = devices.memory_available(where) // (2 * self.replicas)
        return LLM(self.model, **own)


class Replica:
    """One engine in a process of its own."""

    async def __init__(self, make: MakeLLM, threads: int) -> None:  # type: ignore[misc]
        torch.set_num_threads(threads)
        number: Any = serve.get_replica_context().rank
        llm = await asyncio.to_thread(make, number.rank)
        self._backend = LocalBackend(llm)
        self._backend.start()

    def max_context(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._backend.max_context

    async def generate(
        self, ask: Ask, *, tenant: str, prefix: Sequence[Any], length: int
    ) -> AsyncGenerator[list[Piece] | tuple[str | None, bool], None]:
        """The answers to one prompt, as they come; a tuple is for `failure`. `prefix` is for the router."""
        ticket = self._backend.open(await asyncio.to_thread(self._backend.prepare, ask, tenant))
        try:
            while ticket.open:
                parts = await ticket.take(60.0)
                if any(delta.finish_reason == "abort" for _, delta in parts):
                    return  # this replica ends
                for index, delta in parts:
                    if delta.finish_reason == "error":
                        yield delta.error, ticket.generations[index].request.stuck
                        return
                first = ticket.generations[0].request
                pieces = [
                    Piece(i, d.token_ids, d.logprobs, "length" if d.finish_reason == "length" else None)
                    for i, d in parts
                ]
                if pieces:
                    pieces[-1] = replace(
                        pieces[-1], cached=first.cached_tokens, cache_reason=first.cache_reason,
                        prompt_logprobs=None if ticket.open else first.prompt_logprobs,
                    )  # fmt: skip
                yield pieces
        finally:
            ticket.close()

    def __del__(self) -> None:
        if hasattr(self, "_backend"):
            self._backend.close()


class PrefixRouter(RequestRouter):
    """Sends a prompt to the replica that has seen most of it, unless that one is much busier than another."""

    def initialize_state(self, **options: Any) -> None:
        """Begin without knowing anything."""
        self._routes = Routes(**options)
        self._under_way: dict[str, tuple[str, asyncio.Future[Any] | None]] = {}  # replica by request

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, the best first."""
        if pending_request is None or "prefix" not in pending_request.kwargs:
            return [candidate_replicas]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        asked, number = pending_request.kwargs, pending_request.metadata.internal_request_id
        for key, (_, chosen) in list(self._under_way.items()):
            if key == number or (chosen is not None and chosen.cancelled()):
                del self._under_way[key]
        counts = Counter(name for name, _ in self._under_way.values())
        ranked = self._routes.rank(asked["prefix"], asked["length"], {name: counts[name] for name in replicas})
        self._under_way[number] = ranked[0], pending_request.future  # so that who comes in the same moment sees it
        return [[replicas[name]] for name in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note who has got a request."""
        if "prefix" in pending_request.kwargs:
            self._under_way[pending_request.metadata.internal_request_id] = replica_id.unique_id, None
            self._routes.note(pending_request.kwargs["prefix"], replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that it has ended."""
        self._under_way.pop(internal_request_id, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget who has gone."""
        before = {replica.unique_id for replica in self._replicas}
        super().update_replicas(replicas)
        if gone := before - {replica.unique_id for replica in self._replicas}:
            self._routes.forget(gone)


def _deployment(replicas: int, threads: int, accelerators: float, max_concurrent: int) -> Any:
    return serve.deployment(
        Replica,
        name="engine",
        num_replicas=replicas,
        max_ongoing_requests=1 << 16,  # the server bounds its queue
        ray_actor_options={"num_cpus": threads, "num_gpus": accelerators},
        graceful_shutdown_timeout_s=_ROLL_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        request_router_config={
            "request_router_class": PrefixRouter,
            "request_router_kwargs": {"slack": max(max_concurrent // 2, 1)},
        },
        logging_config=_QUIET,
    )


def connect(cpus: int) -> None:
    """Join the cluster, or start one on this machine; FleetError when that fails. Nothing happens the second time.

    Ray takes SIGTERM for itself, so that whoever handles it connects first, and in the main thread.
    """
    if ray.is_initialized():
        return
    here = {"address": "local", "num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
    options: dict[str, Any] = here if _LOCAL else {}
    try:
        ray.init(logging_level=logging.WARNING, **options)
    except (RayError, RuntimeError, ConnectionError, TimeoutError) as error:
        raise _failed(error) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _failed(error: Exception) -> FleetError:
    cause = str(error).strip().splitlines()[0][:300]
    return FleetError(f"the replicas could not be started ({cause}); see Ray's log")


class Fleet:
    """A Source of `replicas` engines that `make` makes, each with `threads` CPU threads.

    Each has so many `accelerators`, by default one where there are any, and takes up to `max_concurrent` requests at
    once. They run on this machine and end with the server; in a cluster that the variable RAY_ADDRESS names they stay,
    and the next server finds them. Raises FleetError.
    """

    def __init__(
        self,
        make: MakeLLM,
        *,
        replicas: int = 2,
        threads: int = 1,
        accelerators: float | None = None,
        max_concurrent: int = 16,
    ) -> None:
        self._rolling = threading.Lock()
        connect(replicas * threads)
        try:
            if accelerators is None:
                accelerators = min(ray.cluster_resources().get("GPU", 0), 1)
            self._app = _deployment(replicas, threads, accelerators, max_concurrent).bind(make, threads)
            serve.start(proxy_location="Disabled", logging_config=_QUIET)
            running = serve.status().applications
            self._handle = serve.get_app_handle(_APP) if _APP in running else serve.run(self._app, name=_APP)
            self._handle = self._handle.options(stream=True)
            self.max_context: int = self._handle.options(stream=False).max_context.remote().result(timeout_s=60)
        except (RayError, RayServeException, RuntimeError, ConnectionError, TimeoutError) as error:
            self._end()
            raise _failed(error) from error

    def check(self, ask: Ask) -> None:
        """A replica can do what an engine here can."""

    def roll(self) -> None:
        """Replace the replicas by new ones, one after the other, each when its answers have ended."""
        if not self._rolling.acquire(blocking=False):
            return
        try:
            _log.warning("the replicas are replaced, one after the other")
            serve.run(self._app, name=_APP)
            _log.warning("the replicas have been replaced")
        except (RayError, RayServeException, RuntimeError) as error:
            _log.error("the replicas were not all replaced: %s", error)
        finally:
            self._rolling.release()

    async def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The job's answers; begun anew on another replica when one goes before it has told anything."""
        request, ask = job.request, job.ask
        if ask.messages is None:
            ask = replace(ask, prompts=(request.prompt_ids,), suffix=None)
        prefix = marks(request.prompt_ids, job.tenant)
        for _ in range(_TRIES):
            told = False
            answers: Any = self._handle.generate.remote(
                ask, tenant=job.tenant, prefix=prefix, length=len(request.prompt_ids)
            )
            try:
                async for pieces in answers:
                    if isinstance(pieces, tuple):
                        raise failure(*pieces)
                    for piece in pieces:
                        told = True
                        yield piece
            except RayTaskError as error:
                _log.error("a replica failed: %s", error)
                raise APIError(500, "the engine failed on this request", code="engine_error") from error
            except (RayError, RayServeException) as error:
                _log.warning("a replica has gone: %s", str(error).strip().splitlines()[0])
            finally:
                answers.cancel()
            if told:
                return  # to begin anew could say something else
        raise APIError(
            503, "no replica of the engine answers; send the request again", code="upstream_unavailable", retry_after=5
        )

    async def close(self) -> None:
        """End the replicas of this machine, or let go of the cluster."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        with suppress(Exception):  # of what is no more
            if _LOCAL:
                serve.delete(_APP)  # replicas write what they keep
        ray.shutdown()
