"""A local server with the public shapes of Mistral's and OpenAI's interfaces.

    GET  /v1/models                the models there are (one)
    POST /v1/chat/completions      an answer to a conversation, whole or as a stream
    POST /v1/completions           the continuation of a text, whole or as a stream
    POST /v1/embeddings            the mean of a text's hidden states, of length 1

Clients made for those interfaces talk to it unmodified. Behind it a Desk decodes all
requests as one batch. The embeddings are what the model happens to have, and no
embedder has been trained: texts about the same things are near, not more is promised.
"""

import asyncio
import base64
import contextlib
import hmac
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from minimistral.api import DONE, Refused, Shape, as_event, as_refusal, count_usage
from minimistral.batching import Busy, Desk, Job
from minimistral.engine import Engine, check_engine
from minimistral.instruct import encode_chat
from minimistral.streaming import TextStream

API_KEY = "MINIMISTRAL_API_KEY"          # the variable that names the key, if any
LARGEST_BODY = 4 << 20                   # bytes
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


# ---------------------------------------------------------------- what may be asked


class Asked(BaseModel):
    """What all requests have. Keys that are not known are passed over, as the public
    servers do; those that would change the answer and are not built are refused."""
    model_config = ConfigDict(strict=True, extra="allow")
    model: str


class TextAsked(Asked):
    """The fields of both kinds of text."""
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2 ** 63), lt=2 ** 63)] = None
    random_seed: Annotated[int | None, Field(ge=0, lt=2 ** 63)] = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int | None, Field(ge=1, le=8)] = None
    stream: bool | None = None
    stream_options: dict | None = None

    @property
    def sampling(self) -> dict:
        """As the engine wants it. Without a temperature it is 1, as the interface
        says."""
        temperature = 1.0 if self.temperature is None else float(self.temperature)
        return {"temperature": temperature, "top_p": self.top_p}

    @property
    def seeds(self) -> list[int]:
        """One for each of the n texts; the first has the seed that was given. Without
        one it is drawn, so that no two requests share a source of chance."""
        seed = self.seed if self.seed is not None else self.random_seed
        seed = secrets.randbits(63) if seed is None else seed
        return [(seed + i) % 2 ** 63 for i in range(self.n or 1)]

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @model_validator(mode="after")
    def refuse_what_is_not_built(self):
        """Raise ValueError for a setting that would silently have no effect."""
        extra = self.model_extra or {}
        plain = {"response_format": [None, {"type": "text"}], "best_of": [None, 1],
                 "echo": [None, False], "logprobs": [None, False, 0]}
        absent = [None, 0, 0.0, [], {}, ""]
        for name in ("tools", "functions", "logprobs", "top_logprobs", "logit_bias",
                     "presence_penalty", "frequency_penalty", "response_format",
                     "suffix", "echo", "best_of"):
            if name in extra and extra[name] not in plain.get(name, absent):
                raise ValueError(f"{name} is not built here")
        return self


class Message(BaseModel):
    """One message; of content in parts only text is understood."""
    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "user", "assistant"]
    content: str | list[dict]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        parts = [part.get("text") for part in self.content if part.get("type") == "text"]
        if len(parts) < len(self.content) or not all(isinstance(p, str) for p in parts):
            raise ValueError("a message's parts must be text here")
        return "".join(parts)


class ChatAsked(TextAsked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


class TextContinued(TextAsked):
    prompt: str | Annotated[list[int], Field(min_length=1)]


class EmbeddingAsked(Asked):
    input: (str | Annotated[list[str], Field(min_length=1, max_length=256)]
            | Annotated[list[int], Field(min_length=1)]
            | Annotated[list[list[int]], Field(min_length=1, max_length=256)])
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None


# ---------------------------------------------------------------- reading a request


async def read_asked(request: Request, kind: type[Asked]) -> Asked:
    """The body of a request, checked. Raises Refused, naming the field."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
    try:
        values = json.loads(bytes(body).decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON in UTF-8", code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refused(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        fields = {*kind.model_fields, *Message.model_fields}
        where = [str(part) for part in first["loc"]
                 if isinstance(part, int) or part in fields]
        name, said = ".".join(where) or None, first["msg"].removeprefix("Value error, ")
        raise Refused(400, f"{name}: {said}" if name else said, param=name) from None


# ---------------------------------------------------------------- texts


class Writing:
    """One text on its way from the engine's thread to the loop of the server."""

    def __init__(self, app, prompt_ids: list[int], limit: int, sampling: dict,
                 stops: list[str], strip: bool):
        loop, self.arrived = asyncio.get_running_loop(), asyncio.Queue()

        def tell(news) -> None:
            try:
                loop.call_soon_threadsafe(self.arrived.put_nowait, news)
            except RuntimeError:                   # the loop has closed: nobody waits
                pass

        self.desk, self.read = app.state.desk, len(prompt_ids)
        self.job = Job(prompt_ids, limit, tell, sampling)
        self.text = TextStream(app.state.tokenizer, stops, strip)
        self.reason: str | None = None             # why it ended: "stop", "length"
        self.written = 0                           # tokens

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it is written; what has come meanwhile is one piece. When nobody
        reads any more, its place is freed."""
        try:
            while self.reason is None:
                piece = self.take(await self.arrived.get())
                while self.reason is None and not self.arrived.empty():
                    piece += self.take(self.arrived.get_nowait())
                if piece:
                    yield piece
        finally:
            self.desk.leave(self.job)

    def take(self, news) -> str:
        """What one piece of news from the engine adds to the text. Raises Refused."""
        if isinstance(news, Exception):
            raise as_refusal(news)
        if isinstance(news, str):
            self.reason, piece = news, self.text.finish()
        else:
            piece = self.text.feed(news)
            self.written += 1
        if self.text.stopped:
            self.reason = "stop"
        return piece


def start_writing(app, asked: TextAsked, prompt_ids: list[int], strip: bool
                  ) -> list[Writing]:
    """The n texts of a request, queued. Raises Refused."""
    limit = getattr(asked, "max_completion_tokens", None) or asked.max_tokens
    room = app.state.max_length - len(prompt_ids)
    if room < 1 or limit is not None and limit > room:
        raise Refused(400, f"the prompt has {len(prompt_ids)} tokens and at most "
                           f"{limit or 1} are to be written, but prompt and answer "
                           f"together have {app.state.max_length}",
                      param="messages" if strip else "prompt",
                      code="context_length_exceeded")
    eos = app.state.tokenizer.eos_id
    texts = [Writing(app, prompt_ids, limit or room,
                     {**asked.sampling, "seed": seed, "stop_ids": (eos,)},
                     asked.stops, strip) for seed in asked.seeds]
    try:
        app.state.desk.submit(*(text.job for text in texts))
    except Busy as error:
        raise as_refusal(error) from None
    return texts


async def answer(request: Request, asked: TextAsked, prompt_ids: list[int], chat: bool):
    """Have the texts written and sent, whole or as server-sent events."""
    texts = start_writing(request.app, asked, prompt_ids, strip=chat)
    shape = Shape(request.app.state.name, chat)
    if asked.stream:
        return StreamingResponse(send_events(shape, asked, texts),
                                 media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache"})
    work = asyncio.gather(*(collect(text) for text in texts))
    leaving = asyncio.create_task(wait_for_leave(request))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Refused(499, "the client has left", "client_closed_request")
        return JSONResponse(shape.whole(texts, work.result()))
    finally:
        leaving.cancel()
        work.cancel()
        for text in texts:
            text.desk.leave(text.job)


async def collect(text: Writing) -> str:
    return "".join([piece async for piece in text.pieces()])


async def wait_for_leave(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def send_events(shape: Shape, asked: TextAsked, texts: list[Writing]
                      ) -> AsyncIterator[str]:
    """The events of a stream: pieces of the n texts as they come, their ends, [DONE].
    An error after the first event can only be told as an event."""
    merged: asyncio.Queue = asyncio.Queue(maxsize=64)      # a slow reader fills it

    async def pump(index: int, text: Writing) -> None:
        try:
            async for piece in text.pieces():
                await merged.put((index, piece, None))
            await merged.put((index, "", text.reason))
        except Refused as error:
            await merged.put((index, error, "error"))

    pumps = [asyncio.create_task(pump(i, text)) for i, text in enumerate(texts)]
    try:
        if shape.chat:
            for i in range(len(texts)):
                yield shape.chunk([shape.choice(i, "delta", "", None)])
        going = len(texts)
        while going:
            index, piece, reason = await merged.get()
            if isinstance(piece, Refused):
                yield as_event({"error": piece.details})
                return
            going -= reason is not None
            more = {} if going else {"usage": count_usage(texts)}
            yield shape.chunk([shape.choice(index, "delta", piece, reason)], **more)
        if (asked.stream_options or {}).get("include_usage"):
            yield shape.chunk([], usage=count_usage(texts))
        yield DONE
    finally:
        for task in pumps:
            task.cancel()
        for text in texts:
            text.desk.leave(text.job)


# ---------------------------------------------------------------- the four addresses


def check_model(app, name: str) -> None:
    if name != app.state.name:
        raise Refused(404, f"there is no model {name!r}; there is {app.state.name!r}",
                      param="model", code="model_not_found")


async def chat_completions(request: Request):
    asked = await read_asked(request, ChatAsked)
    check_model(request.app, asked.model)
    try:
        messages = [{"role": m.role, "content": m.text} for m in asked.messages]
        if messages[-1]["role"] != "user":
            raise ValueError("the last message must be the user's")
        prompt_ids, _ = encode_chat(request.app.state.tokenizer, messages)
    except ValueError as error:
        raise Refused(400, str(error), param="messages") from None
    return await answer(request, asked, prompt_ids, chat=True)


async def completions(request: Request):
    asked = await read_asked(request, TextContinued)
    check_model(request.app, asked.model)
    tokenizer, prompt = request.app.state.tokenizer, asked.prompt
    if isinstance(prompt, str):
        try:
            prompt = tokenizer.encode(prompt, bos=True)
        except ValueError as error:
            raise Refused(400, str(error), param="prompt") from None
    return await answer(request, asked, prompt, chat=False)


async def embeddings(request: Request):
    asked = await read_asked(request, EmbeddingAsked)
    app = request.app
    check_model(app, asked.model)
    given = asked.input
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    try:
        rows = [app.state.tokenizer.encode(one, bos=True) if isinstance(one, str) else one
                for one in given]
    except ValueError as error:
        raise Refused(400, str(error), param="input") from None
    for row in rows:
        if not 0 < len(row) <= app.state.max_length:
            raise Refused(400, f"an input of {len(row)} tokens; from 1 to "
                               f"{app.state.max_length} are read", param="input",
                          code="context_length_exceeded")
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def errand() -> None:
        try:
            result = [embed(app.state.engine.fast.model, row) for row in rows]
        except Exception as error:
            result = error
        loop.call_soon_threadsafe(lambda: done.cancelled() or done.set_result(result))

    try:
        app.state.desk.run_between(errand)
    except Busy as error:
        raise as_refusal(error) from None
    vectors = await done
    if isinstance(vectors, Exception):
        raise as_refusal(vectors)
    packed = asked.encoding_format == "base64"
    data = [{"object": "embedding", "index": i, "embedding": as_base64(v) if packed else v}
            for i, v in enumerate(vectors)]
    read = sum(map(len, rows))
    return JSONResponse({"id": f"embd-{uuid.uuid4().hex}", "object": "list",
                         "data": data, "model": app.state.name,
                         "usage": {"prompt_tokens": read, "completion_tokens": 0,
                                   "total_tokens": read}})


@torch.no_grad()
def embed(model, ids: list[int]) -> list[float]:
    """The mean of the hidden states of a text, of length 1: (dim,)."""
    states = model.features(torch.tensor([ids], device=model.device))     # (1, T, dim)
    mean = states[0].float().mean(dim=0)
    return torch.nn.functional.normalize(mean, dim=0).tolist()


def as_base64(vector: list[float]) -> str:
    """float32, little-endian, as the public interface packs them."""
    return base64.b64encode(torch.tensor(vector).numpy().astype("<f4").tobytes()).decode()


def describe_model(app) -> dict:
    return {"id": app.state.name, "object": "model", "type": "base",
            "created": app.state.created, "owned_by": "minimistral",
            "max_context_length": app.state.max_length,
            "capabilities": {"completion_chat": True, "completion_fim": False,
                             "function_calling": False, "fine_tuning": False,
                             "vision": False}}


async def models(request: Request):
    return JSONResponse({"object": "list", "data": [describe_model(request.app)]})


async def one_model(request: Request):
    check_model(request.app, request.path_params["name"])
    return JSONResponse(describe_model(request.app))


# ---------------------------------------------------------------- the application


def respond(refused: Refused) -> JSONResponse:
    headers = {"Retry-After": "1"} if refused.status == 429 else None
    return JSONResponse(refused.body, refused.status, headers=headers)


def check_caller(request: Request, api_key: str | None, hosts: tuple[str, ...] | None) -> None:
    """Raise Refused for a caller without the key, or from a page of another host."""
    if hosts is not None:
        origin = request.headers.get("origin")           # browsers name the page's
        called = [request.headers.get("host", "")]
        for name in [*called, origin.partition("//")[2]] if origin else called:
            if re.sub(r":\d*$", "", name).lower() not in hosts:
                raise Refused(403, f"this server may not be called as or from {name!r}",
                              "permission_error", code="host_not_allowed")
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    raw = given.encode("latin-1")                          # the bytes that were sent
    if api_key and not hmac.compare_digest(raw, api_key.encode()):
        raise Refused(401, "the API key is missing or wrong",
                      "authentication_error", code="invalid_api_key")


def create_app(model, tokenizer, *, name: str, batch_size: int = 8,
               max_length: int = 4096, max_waiting: int = 64,
               api_key: str | None = None, hosts: tuple[str, ...] | None = LOOPBACK,
               **engine_options) -> Starlette:
    """The server as an ASGI application.

    name         what clients ask for as `model`
    batch_size   how many texts are written at once; max_waiting: how many may wait
    max_length   tokens of a prompt and its answer together
    api_key      what clients must send as a bearer token, if anything
    hosts        names under which it may be called, or None for any: so a web page
                 elsewhere can't reach a server on this machine, neither under a name
                 of its own nor from its own address
    """
    check_engine(batch_size, max_length, "auto", None, 0)  # now: later is in the server's log

    @asynccontextmanager
    async def lifespan(app):
        engine = Engine(model, batch_size, max_length, **engine_options)
        app.state.engine, app.state.desk = engine, Desk(engine, max_waiting)
        try:
            yield
        finally:
            await asyncio.to_thread(app.state.desk.close)

    def guarded(endpoint):
        async def guard(request: Request):
            check_caller(request, api_key, hosts)
            try:
                return await endpoint(request)
            except ClientDisconnect:
                raise Refused(499, "the client has left", "client_closed_request") from None
        return guard

    routes = [Route("/v1/models", guarded(models)),
              Route("/v1/models/{name:path}", guarded(one_model)),
              *(Route(f"/v1/{path}", guarded(endpoint), methods=["POST"])
                for path, endpoint in (("chat/completions", chat_completions),
                                       ("completions", completions),
                                       ("embeddings", embeddings)))]

    def as_public_error(request, error: HTTPException):
        return respond(Refused(error.status_code, str(error.detail)))

    async def as_server_error(request, error: Exception):
        return respond(as_refusal(RuntimeError()))

    app = Starlette(
        routes=routes, lifespan=lifespan,
        exception_handlers={Refused: lambda request, error: respond(error),
                            HTTPException: as_public_error, Exception: as_server_error})
    app.state.name, app.state.tokenizer = name, tokenizer
    app.state.created, app.state.max_length = int(time.time()), max_length
    return app


def run(model, tokenizer, *, name: str, host: str = "127.0.0.1", port: int = 8000,
        threads: int | None = None, **options) -> None:
    """Serve until stopped, and say on stderr when and where the server answers: to compile the
    model comes first and can take a minute. The key is that of the variable
    MINIMISTRAL_API_KEY.

    threads  cores for the model; one less than there are by default: the thread that
             talks with the clients needs one, or it holds the others up
    Raises ValueError for an address that others can reach, without a key, and for one where
    no server can listen.
    """
    import uvicorn

    key = os.environ.get(API_KEY) or None
    local = host in ("127.0.0.1", "::1", "localhost")
    if not local and not key:
        raise ValueError(f"at {host} others can reach this server: set {API_KEY} to a "
                         f"key that clients must send, or stay at 127.0.0.1")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be at least 1")
    torch.set_num_threads(threads or max(1, torch.get_num_threads() - 1))
    app = create_app(model, tokenizer, name=name, api_key=key,
                     hosts=LOOPBACK if local else None, **options)
    place = bound(host, port)

    class Announced(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"{name} at http://{host}:{place.getsockname()[1]}/v1  (Ctrl-C ends it)",
                      file=sys.stderr, flush=True)

    server = Announced(uvicorn.Config(app, host=host, port=port, log_level="warning",
                                      timeout_graceful_shutdown=5))
    with contextlib.suppress(KeyboardInterrupt):
        server.run([place])


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, where nothing listens yet. Raises ValueError if it cannot be had."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} must be a whole number from 0 (a free one) to 65535")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        if os.name == "posix":  # elsewhere this would share an address that is taken
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
    except OSError as error:
        raise ValueError(f"no server can listen at {host}, port {port} ({error.strerror}); "
                         f"--port names another, 0 takes a free one") from None
    return found


class LocalServer:
    """The server in a thread of this program, on loopback: at .address until stop().

    port  0 takes a free one;  options: those of create_app
    """

    def __init__(self, model, tokenizer, *, name: str, port: int = 0, **options):
        import uvicorn

        self.app = create_app(model, tokenizer, name=name, **options)
        listening = socket.create_server(("127.0.0.1", port))
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """Refuse what is not done, and wait for the thread's end."""
        self.server.should_exit = True
        self.thread.join()

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
