"""OpenAI's API over the token engine: /v1/models, /v1/completions, /v1/chat/completions, whole answers and streams.

What is not supported is refused with 400 by its name (api_request.py). An asker that goes away stops its answer. Leaves out who may ask:
that is the app's, which these routes are mounted in.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ground_station import api_request
from ground_station.api_answers import Choice, Head, usage_of
from ground_station.api_chat import ChatTemplate, TemplateFailed
from ground_station.api_errors import ApiRefusal, answer, body_of, dump, refusal, shown
from ground_station.api_request import Asked
from ground_station.engine import Engine
from ground_station.engine_request import EngineClosed, EngineFull, Handle, RequestRefused, Usage

log = logging.getLogger("spacemoe.api")

Endpoint = Callable[[Request], Awaitable[Response]]


def create_routes(engine: Engine, template: ChatTemplate, model: str | None = None) -> list[Route]:
    """The routes, for a Starlette app. `template`: api_chat.template_of the bundle; `model`: its name here (None: the bundle's)."""
    api = Api(engine, template, model or engine.manifest.name)
    return [
        Route("/v1/models", _guarded(api.models), methods=["GET"]),
        Route("/v1/models/{model:path}", _guarded(api.one_model), methods=["GET"]),
        Route("/v1/completions", _guarded(api.completions), methods=["POST"]),
        Route("/v1/chat/completions", _guarded(api.chat), methods=["POST"]),
        Route("/v1/{rest:path}", _guarded(api.nothing), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Every error in OpenAI's form."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiRefusal as error:
            return refusal(error)
        except RequestRefused as error:
            return refusal(ApiRefusal(str(error), error.field, error.code))
        except TemplateFailed as error:
            return refusal(ApiRefusal(str(error), "messages", "template"))
        except EngineFull as error:
            return refusal(ApiRefusal(str(error), None, "queue_full", 429, error.retry_s))
        except EngineClosed as error:
            return refusal(ApiRefusal(str(error), None, "engine_closed", 503, 10))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            log.exception("%s %s failed", request.method, shown(request.url.path))
            return refusal(ApiRefusal("this failed; the ground station's log says where", None, "internal", 500))

    return guarded


class Api:
    """The endpoints of one engine."""

    def __init__(self, engine: Engine, template: ChatTemplate, model: str):
        self.engine, self.template, self.model = engine, template, model
        self.created = int(time.time())
        self.fingerprint = f"fp_{engine.manifest.recipe.get('hash', '')[:12] or 'unknown'}"

    async def nothing(self, request: Request) -> Response:
        raise ApiRefusal(f"there is no {request.method} {shown(request.url.path)} here", None, "unknown_url", 404)

    async def models(self, _request: Request) -> Response:
        return answer({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        self._is_model(request.path_params["model"])
        return answer(self._model())

    def _model(self) -> dict[str, Any]:
        manifest, options = self.engine.manifest, self.engine.options
        about = {
            "context_tokens": manifest.dims.max_context,
            "chat_template": self.template.description,
            "licence": manifest.licence,
            "base_model": manifest.base_model,
            "batch": options.batch,
            "queue": options.queue,
        }
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "spacemoe",
            "max_model_len": manifest.dims.max_context,
            "spacemoe": about,
        }

    def _is_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            text = f"there is no model {shown(name)} here: GET /v1/models names the one there is"
            raise ApiRefusal(text, "model", "model_not_found", 404)

    async def completions(self, request: Request) -> Response:
        asked = api_request.completion(await body_of(request))
        self._is_model(asked.model)
        if len(asked.prompts) * asked.n > self.engine.options.queue:
            raise ApiRefusal(
                f"{len(asked.prompts)} prompts with {asked.n} answers each are over the limit of {self.engine.options.queue}",
                "prompt",
                "too_many",
            )
        prompts = await run_in_threadpool(lambda: [self._ids(prompt) for prompt in asked.prompts])
        return await self._answer(request, asked, prompts, ())

    async def chat(self, request: Request) -> Response:
        asked = api_request.chat(await body_of(request))
        self._is_model(asked.model)

        def ids() -> list[int]:
            return self._ids(self.template.render(asked.messages), "messages", self.template.bos)

        return await self._answer(request, asked, [await run_in_threadpool(ids)], self.template.stops)

    def _ids(self, prompt: str | tuple[int, ...], field: str = "prompt", bos: bool = True) -> list[int]:
        """A text's tokens, the bundle's first token in front; token ids are taken as they are.  Raises: ApiRefusal."""
        if not isinstance(prompt, str):
            return list(prompt)
        first = [] if self.engine.manifest.bos_id is None or not bos else [self.engine.manifest.bos_id]
        try:
            return first + self.engine.text.encode(prompt)
        except ValueError as error:
            raise ApiRefusal(str(error), field, "invalid_value") from None

    async def _answer(
        self, request: Request, asked: Asked, prompts: list[list[int]], stops: tuple[str, ...]
    ) -> Response:
        name = f"{'chatcmpl' if asked.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        head = Head(name, int(time.time()), self.model, self.fingerprint, asked)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        count, room = len(prompts) * asked.n, self.engine.manifest.dims.max_context
        requests, choices = [], []
        for index in range(count):
            ids, choice = prompts[index // asked.n], index % asked.n
            part = name if count == 1 else f"{name}-{index}"
            requests.append(asked.request(part, ids, room, choice, seed, stops))
            echoed = self._echoed(asked, index // asked.n, ids) if asked.echo else ""
            choices.append(Choice(index, asked, self.engine.names, echoed))
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:
                pass  # the server has ended, and with it whoever asked

        handles = self.engine.submit(*requests, wake=wake)
        answers = _Answers(head, handles, choices, [len(ids) for ids in prompts], woken)
        if asked.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(answers.stream(), media_type="text/event-stream", headers=headers)
        return await answers.whole(request)

    def _echoed(self, asked: Asked, index: int, ids: list[int]) -> str:
        prompt = asked.prompts[index]
        return prompt if isinstance(prompt, str) else self.engine.text.decode(ids)


class _Answers:
    """The answers to one HTTP request, which end together; whoever leaves before that cancels them."""

    def __init__(
        self, head: Head, handles: list[Handle], choices: list[Choice], prompts: list[int], woken: asyncio.Event
    ):
        self._head, self._handles, self._choices, self._prompts, self._woken = head, handles, choices, prompts, woken

    def _news(self) -> list[dict[str, Any]]:
        """Parts of a stream that have come; what failed is raised.  Raises: ApiRefusal."""
        parts = []
        for handle, choice in zip(self._handles, self._choices):
            for event in handle.take():
                part = choice.hear(event)
                if part:
                    parts.append(part)
        if failed := [choice.failed for choice in self._choices if choice.failed is not None]:
            raise ApiRefusal(failed[0], None, "engine_failed", 503)
        return parts

    @property
    def _ended(self) -> bool:
        return all(choice.reason is not None for choice in self._choices)

    @property
    def _settled(self) -> bool:
        return all(choice.usage is not None for choice in self._choices)

    def _usage(self) -> dict[str, Any]:
        usages: list[Usage] = [choice.usage for choice in self._choices]
        return usage_of(usages, self._prompts)

    def _cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()

    async def stream(self) -> AsyncIterator[bytes]:
        head = self._head
        try:
            while not (self._settled if head.asked.include_usage else self._ended):
                await self._woken.wait()
                self._woken.clear()
                for part in self._news():
                    yield b"data: " + dump(head.chunk([part])) + b"\n\n"
            if head.asked.include_usage:
                yield b"data: " + dump(head.chunk([], self._usage())) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except ApiRefusal as error:  # the status has been sent: clients look for an error among the data
            yield b"data: " + dump(error.tree()) + b"\n\n"
        finally:
            self._cancel()

    async def whole(self, request: Request) -> Response:
        gone = asyncio.ensure_future(_gone(request))
        gone.add_done_callback(lambda _: self._woken.set())
        try:
            while not self._settled:
                await self._woken.wait()
                self._woken.clear()
                if gone.done():
                    raise ClientDisconnect
                self._news()
        finally:
            gone.cancel()
            self._cancel()
        return answer(self._head.whole([choice.whole() for choice in self._choices], self._usage()))


async def _gone(request: Request) -> None:
    """Waits until the asker has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
