"""The same prompts to a model behind a URL: any server that speaks OpenAI's chat completions.

A pruned model is often served by vLLM, llama.cpp or `transformers serve`; what they do to it (quantisation, another
template) is then part of what is measured. Answers go to the same log as those of a model in memory. The key is read
from the environment, and stands in no log and no message.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..data.calibration import check_integer
from ..errors import InvalidParameter, LoadFailure, RunFailure, UsageError
from ..models.fetch import one_line
from ..progress import Progress, silent
from .decoding import Decoding
from .log import Header, Key, writing
from .prompts import PromptSet
from .records import Answer, Prompt

KEY_ENV = "OPENAI_API_KEY"
AGAIN = (408, 409, 425, 429)  # and 5xx: the same request may succeed later
LONGEST_WAIT = 60.0  # seconds between two attempts
LARGEST_REPLY = 1 << 24  # bytes
Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers, and how patiently it is asked.

    Args:
        url: the base, as `http://localhost:8000/v1`.
        model: the name it is served under.
        key_env: the environment variable that holds the key; without it, none is sent.
        timeout: seconds for one answer.
        retries: further attempts after one that failed.
        backoff: seconds before the first of them, doubled each time; what the server asks for goes before.
        concurrency: requests at a time.
        max_requests: in all, further attempts included; None = no limit.

    Raises:
        InvalidParameter: a value outside its range.
        UsageError: the URL holds a password, or the variable named is not set.

    >>> Endpoint("localhost:8000", "tiny")
    Traceback (most recent call last):
    secateur.errors.InvalidParameter: The 'url' of endpoint must be a base URL, as http://localhost:8000/v1. Got ...
    """

    url: str
    model: str
    key_env: str = KEY_ENV
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 1.0
    concurrency: int = 4
    max_requests: int | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        try:
            parts.port  # noqa: B018 - checks the range
        except ValueError as error:
            raise InvalidParameter("url", "endpoint", "a base URL with a port below 65536", self.url) from error
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise InvalidParameter("url", "endpoint", "a base URL, as http://localhost:8000/v1", self.url)
        if "@" in parts.netloc:
            raise UsageError(f"The URL of the endpoint at {parts.hostname} holds a password: put it in {self.key_env}.")
        if not self.model.strip():
            raise InvalidParameter("model", "endpoint", "the name of a model that is served there", self.model)
        for name, value, least in (("timeout", self.timeout, 1e-3), ("backoff", self.backoff, 0.0)):
            if isinstance(value, bool) or not math.isfinite(value) or value < least:
                raise InvalidParameter(name, "endpoint", f"a number of seconds, at least {least:g}", value)
        check_integer("retries", "endpoint", self.retries, 0)
        check_integer("concurrency", "endpoint", self.concurrency, 1)
        if self.max_requests is not None:
            check_integer("max_requests", "endpoint", self.max_requests, 1)
        if self.key_env != KEY_ENV and not os.environ.get(self.key_env):
            raise UsageError(f"The environment variable {self.key_env}, which should hold the key, is not set.")


class Reply(NamedTuple):
    """What came back; `tokens` is 0 where the server does not count."""

    text: str
    tokens: int
    finish: str


class _Passing(Exception):
    """An attempt failed and another may not; `wait` is what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class Connection:
    """An open endpoint; may be called from several threads. Made by `connect`."""

    def __init__(self, endpoint: Endpoint, client: Any) -> None:
        self.endpoint, self.requests = endpoint, 0
        self._client, self._lock, self._closing = client, threading.Lock(), threading.Event()

    def chat(self, turns: Turns, *, max_tokens: int, temperature: float = 0.0, seed: int | None = None) -> Reply:
        """One answer to a conversation of (role, content).

        Raises:
            RunFailure: the endpoint is down, too slow, refuses, or answers nonsense, after all attempts; or the limit
                of requests is reached.
        """
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": role, "content": content} for role, content in turns],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": False,
        }
        if seed is not None:
            body["seed"] = seed % (1 << 31)
        attempts = self.endpoint.retries + 1
        for attempt in range(attempts):
            self._count()
            try:
                return self._once(body)
            except _Passing as error:
                why, wait = str(error), error.wait or self.endpoint.backoff * 2**attempt
            if attempt + 1 < attempts and self._closing.wait(min(wait, LONGEST_WAIT)):
                break
        tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        raise RunFailure(f"The endpoint {self.endpoint.url} {why}, in {tried}: is the server running, and right?")

    def close(self) -> None:
        """No further attempts."""
        self._closing.set()

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    def _count(self) -> None:
        limit = self.endpoint.max_requests
        with self._lock:
            if limit is not None and self.requests >= limit:
                raise RunFailure(
                    f"The limit of {limit} requests to {self.endpoint.url} is reached: raise max_requests."
                )
            self.requests += 1

    def _once(self, body: dict[str, Any]) -> Reply:
        import httpx

        deadline = time.monotonic() + self.endpoint.timeout
        late = _Passing(f"did not answer within {self.endpoint.timeout:g} s")
        received = bytearray()
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                for part in response.iter_bytes():
                    received += part
                    if time.monotonic() > deadline:
                        raise late
                    if len(received) > LARGEST_REPLY:
                        raise _Passing(f"answers nonsense (over {LARGEST_REPLY >> 20} MiB)")
        except httpx.TimeoutException as error:
            raise late from error
        except httpx.HTTPError as error:
            raise _Passing(f"does not answer ({one_line(error)})") from error
        status = response.status_code
        if status in AGAIN or status >= 500:
            raise _Passing(f"answers with the error {status}", _seconds(response.headers.get("retry-after")))
        if status >= 300:
            raise RunFailure(
                f"The endpoint {self.endpoint.url} refuses the request for '{self.endpoint.model}' with the error "
                f"{status}{_message(bytes(received), body)}: check the URL, the model's name and the key."
            )
        return _reply(bytes(received))


@contextmanager
def connect(endpoint: Endpoint) -> Iterator[Connection]:
    """An endpoint to ask, closed at the end.

    Raises:
        LoadFailure: the package httpx is not installed.
        UsageError: the key is not ASCII.
    """
    try:
        import httpx
    except ImportError as error:
        raise LoadFailure("An endpoint needs the package 'httpx': pip install 'secateur[safety]'.") from error
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key.isascii():
        raise UsageError(f"The key in {endpoint.key_env} holds characters that no key has: copy it again.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=endpoint.concurrency)
    base = endpoint.url.rstrip("/") + "/"
    with httpx.Client(base_url=base, headers=headers, timeout=endpoint.timeout, limits=limits) as client:
        connection = Connection(endpoint, client)
        try:
            yield connection
        finally:
            connection.close()


def answer_at(
    endpoint: Endpoint,
    prompts: PromptSet | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    system: str | None = None,
    log: str | Path | None = None,
    progress: Progress = silent,
) -> list[Answer]:
    """What the served model writes to each prompt.

    Args:
        endpoint: where it is served.
        prompts: a set, or prompts with unique ids.
        max_new_tokens, samples, temperature, seed, system: see `Decoding`; whether the seed is obeyed is the server's.
        log: a file that every answer is written to; a run with the same file goes on where it ended.
        progress: called with answers done and in all.

    Returns:
        `samples` answers a prompt, in the order of the prompts.

    Raises:
        RunFailure: as `Connection.chat`; what was answered until then is in the log.
        UsageError: the log is of another run.
        InvalidParameter: an option outside its range.
    """
    decoding = Decoding(max_new_tokens, samples, temperature, seed, system)
    chosen = prompts if isinstance(prompts, PromptSet) else PromptSet("prompts", tuple(prompts), "in memory")
    header = Header.of({"name": endpoint.model, "url": endpoint.url}, decoding.to_dict(), chosen)
    wanted = [(prompt, sample) for prompt in chosen for sample in range(samples)]

    def one(connection: Connection, prompt: Prompt, sample: int) -> Answer | None:
        if connection.closing:  # another request has failed for good
            return None
        chance = decoding.stream(prompt, sample) if temperature else None
        turns = decoding.turns(prompt)
        try:
            reply = connection.chat(turns, max_tokens=max_new_tokens, temperature=decoding.temperature, seed=chance)
        except RunFailure:
            connection.close()
            raise
        return Answer(prompt.id, prompt.sha256, reply.text, reply.tokens, reply.finish, sample)

    with writing(log, header) as open_log, connect(endpoint) as connection:
        left = [(prompt, sample) for prompt, sample in wanted if (prompt.id, sample) not in open_log.answers]
        total = len(wanted)
        progress(total - len(left), total, "asking")
        with ThreadPoolExecutor(endpoint.concurrency) as pool:
            asked = [pool.submit(one, connection, prompt, sample) for prompt, sample in left]
            try:
                for done, future in enumerate(as_completed(asked), total - len(left) + 1):
                    open_log.add(filter(None, [future.result()]))
                    progress(done, total, "asking")
            except BaseException as error:
                connection.close()
                pool.shutdown(cancel_futures=True)  # waits for the answers that are on their way
                open_log.add(_rest(asked, open_log.answers))
                if isinstance(error, RunFailure):
                    raise RunFailure(f"{error} {_kept(log, len(open_log.answers), total)}") from error
                raise
        return [open_log.answers[prompt.id, sample] for prompt, sample in wanted]


def _rest(asked: Sequence[Future[Answer | None]], known: dict[Key, Answer]) -> list[Answer]:
    """What else has arrived."""
    ended = [future.result() for future in asked if future.done() and not future.cancelled() and not future.exception()]
    return [answer for answer in ended if answer is not None and (answer.prompt, answer.sample) not in known]


def _kept(log: str | Path | None, done: int, total: int) -> str:
    if log is None:
        return f"{done} of {total} answers are lost: give a log to keep them."
    return f"{done} of {total} answers are kept in {log}, and the same call goes on from there."


def _reply(received: bytes) -> Reply:
    try:
        content = json.loads(received)
        choice = content["choices"][0]
        message = choice["message"]
        text = message.get("content")
        text = message.get("refusal") if text is None else text  # where a server tells refusals apart
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Passing("answers nonsense (no JSON with choices[0].message)") from error
    if not isinstance(text, str):
        raise _Passing("answers nonsense (choices[0].message.content is no string)")
    usage = content.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Reply(text, tokens if isinstance(tokens, int) else 0, finish)


def _message(received: bytes, body: dict[str, Any]) -> str:
    """The server's own words, unless they repeat the prompt."""
    try:
        error = json.loads(received)
        error = error.get("error", error.get("detail"))
        text = " ".join(str(error["message"] if isinstance(error, dict) else error).split())[:160]
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    repeats = any(str(turn["content"])[:12] in text for turn in body["messages"])
    return "" if repeats or not text or error is None else f" ({text})"


def _seconds(text: str | None) -> float:
    """
    >>> _seconds("2.5"), _seconds(None), _seconds("Wed, 21 Oct 2026 07:28:00 GMT")
    (2.5, 0.0, 0.0)
    """
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
