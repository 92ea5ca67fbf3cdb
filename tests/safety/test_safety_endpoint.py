"""Answers from a URL: a scripted server that is well, down, slow, moody or mad; and a real one."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from families import make
from safety_chat import chat_tokenizer, some_prompts

from secateur.errors import InvalidParameter, RunFailure, UsageError
from secateur.safety.endpoint import Endpoint, answer_at, connect
from secateur.safety.generate import answer
from secateur.safety.log import read_log


def completion(text, finish="stop", tokens=3):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()


class Scripted:
    """What a request gets is (status, body, headers); `asked` has the bodies in the order they came."""

    def __init__(self, script):
        self.script, self.asked, self.keys, self.most, self.now = script, [], [], 0, 0
        self.lock = threading.Lock()

    def handler(server):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.lock:
                    server.asked.append(body)
                    server.keys.append(self.headers.get("authorization"))
                    server.now += 1
                    server.most = max(server.most, server.now)
                    number = len(server.asked)
                status, content, headers = server.script(number, body, self.path)
                with server.lock:
                    server.now -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                """Quiet."""

        return Handler


@contextmanager
def serving(script):
    scripted = Scripted(script)
    server = ThreadingHTTPServer(("127.0.0.1", 0), scripted.handler())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", scripted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def echo(number, body, path):
    assert path == "/v1/chat/completions"
    return 200, completion("you said " + body["messages"][-1]["content"]), {}


def at(url, **options):
    return Endpoint(url, "tiny", **{"backoff": 0.0, "retries": 1, "timeout": 5.0} | options)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_every_prompt_gets_its_own_answer_in_order() -> None:
    prompts = some_prompts(9)
    with serving(echo) as (url, server):
        found = answer_at(at(url), prompts, max_new_tokens=11, system="w1")
    assert [one.text for one in found] == [f"you said {prompt.text}" for prompt in prompts]
    assert [(one.prompt, one.sha256) for one in found] == [(prompt.id, prompt.sha256) for prompt in prompts]
    body = server.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "w1"} and "seed" not in body
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 11, 0.0)


def test_samples_are_asked_for_one_by_one_with_a_seed_each() -> None:
    with serving(echo) as (url, server):
        found = answer_at(at(url), some_prompts(2), samples=3, temperature=0.5)
    assert [one.sample for one in found] == [0, 1, 2, 0, 1, 2]
    assert len({body["seed"] for body in server.asked}) == 6 and {body["temperature"] for body in server.asked} == {0.5}


def test_the_key_is_sent_and_never_written(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    log = tmp_path / "run.jsonl"
    with serving(echo) as (url, server):
        answer_at(at(url, key_env="MY_KEY"), some_prompts(2), log=log)
    assert server.keys == ["Bearer sesame"] * 2 and "sesame" not in log.read_text()
    refused = json.dumps({"error": {"message": "wrong key"}}).encode()
    with (
        serving(lambda *_: (401, refused, {})) as (url, _),
        pytest.raises(RunFailure, match=r"401 .wrong key") as error,
    ):
        answer_at(at(url, key_env="MY_KEY"), some_prompts(2))
    assert "sesame" not in str(error.value)
    monkeypatch.setenv("MY_KEY", "sésame")
    with pytest.raises(UsageError, match="characters that no key has"):
        answer_at(at("http://x/v1", key_env="MY_KEY"), some_prompts(2))
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UsageError, match="MY_KEY, which should hold the key, is not set"):
        at("http://x/v1", key_env="MY_KEY")


def test_no_more_requests_at_a_time_than_asked() -> None:
    def slow(*request):
        time.sleep(0.03)
        return echo(*request)

    with serving(slow) as (url, server):
        answer_at(at(url, concurrency=3), some_prompts(12))
    assert server.most in (2, 3)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_error_is_tried_again(status) -> None:
    def moody(number, body, path):
        return echo(number, body, path) if number % 2 == 0 else (status, b"later", {"retry-after": "0.01"})

    with serving(moody) as (url, server):
        found = answer_at(at(url, concurrency=1), some_prompts(3))
    assert len(found) == 3 and len(server.asked) == 6


def nothing(number, body, path):
    time.sleep(1.0)
    return echo(number, body, path)


@pytest.mark.parametrize(
    ("script", "options", "says", "requests"),
    [
        (lambda *_: (503, b"", {}), {"retries": 2}, "answers with the error 503, in 3 attempts", 3),
        (lambda *_: (200, b"<html>hello</html>", {}), {}, r"nonsense \(no JSON with choices", 2),
        (lambda *_: (200, b"[]", {}), {}, r"nonsense \(no JSON with choices", 2),
        (lambda *_: (200, b'{"choices": []}', {}), {}, r"nonsense \(no JSON with choices", 2),
        (lambda *_: (200, completion(7), {}), {}, "nonsense .*is no string", 2),
        (lambda *_: (404, b'{"detail": "no such model"}', {}), {}, r"'tiny' with the error 404 \(no such model\)", 1),
        (lambda n, body, p: (400, json.dumps({"error": body["messages"][0]["content"]}).encode(), {}), {}, "400:", 1),
        (lambda *_: (301, b"", {"location": "/elsewhere"}), {}, "the error 301", 1),
        (nothing, {"timeout": 0.1, "retries": 0}, r"did not answer within 0.1 s, in 1 attempt:", 1),
    ],
)
def test_what_goes_wrong_is_one_line(script, options, says, requests) -> None:
    with serving(script) as (url, server), pytest.raises(RunFailure, match=says) as error:
        answer_at(at(url, concurrency=1, **options), some_prompts(4))
    line = str(error.value)
    assert "\n" not in line and line.endswith("0 of 4 answers are lost: give a log to keep them.")
    assert len(server.asked) == requests and "w" not in re.findall(r"error 400(.*?):", line)


def test_a_server_that_is_down_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RunFailure, match=rf"127.0.0.1:{port}/v1 does not answer .*in 2 attempts"):
        answer_at(at(f"http://127.0.0.1:{port}/v1"), some_prompts(2))


def test_a_reply_that_drips_is_late_too() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
            try:
                for _ in range(100):
                    connection.sendall(b" ")
                    time.sleep(0.05)
            except OSError:  # the other side has had enough
                return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    with listener, pytest.raises(RunFailure, match=r"did not answer within 0\.3 s"):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        answer_at(at(url, timeout=0.3, retries=0), some_prompts(1))
    thread.join(10)


def test_a_partial_log_is_kept_and_resumed(tmp_path) -> None:
    prompts, log = some_prompts(8), tmp_path / "run.jsonl"

    def breaks(number, body, path):
        return echo(number, body, path) if number <= 5 else (200, b"gone mad", {})

    with serving(breaks) as (url, _):
        endpoint = at(url, concurrency=2)
        with pytest.raises(RunFailure, match=rf"[45] of 8 answers are kept in {log}, and the same call goes on"):
            answer_at(endpoint, prompts, log=log)
    kept = len(read_log(log).answers)
    assert kept in (4, 5)
    with serving(echo) as (url, server):
        with pytest.raises(UsageError, match="of a run with model url"):
            answer_at(replace(endpoint, url=url), prompts, log=log)
        assert not server.asked
        moved = log.read_text().replace(endpoint.url, url)
        log.write_text(moved)
        found = answer_at(replace(endpoint, url=url), prompts, log=log)
    assert len(server.asked) == 8 - kept
    assert [one.text for one in found] == [f"you said {prompt.text}" for prompt in prompts]


def test_the_limit_of_requests_counts_attempts(tmp_path) -> None:
    log = tmp_path / "run.jsonl"
    with (
        serving(echo) as (url, server),
        pytest.raises(RunFailure, match=r"limit of 3 requests .*3 of 5 answers are kept"),
    ):
        answer_at(at(url, max_requests=3, concurrency=1), some_prompts(5), log=log)
    assert len(server.asked) == 3 == len(read_log(log).answers)


def test_chat_serves_others_too() -> None:
    with serving(lambda *_: (200, completion("yes", "length", 1), {})) as (url, _), connect(at(url)) as connection:
        assert connection.chat((("user", "w1"),), max_tokens=1) == ("yes", 1, "length")


def test_a_refusal_in_its_own_field_is_the_answer() -> None:
    refused = {"choices": [{"message": {"content": None, "refusal": "I'd rather not."}, "finish_reason": "stop"}]}
    with serving(lambda *_: (200, json.dumps(refused).encode(), {})) as (url, _):
        (found,) = answer_at(at(url), some_prompts(1))
    assert (found.text, found.tokens) == ("I'd rather not.", 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "localhost:8000"}, "'url' of endpoint must be a base URL"),
        ({"url": "http://x:99999/v1"}, "a port below 65536"),
        ({"url": "http://me:secret@x/v1"}, "holds a password: put it in OPENAI_API_KEY"),
        ({"model": " "}, "'model' of endpoint"),
        ({"timeout": 0}, "'timeout' of endpoint"),
        ({"backoff": float("nan")}, "'backoff' of endpoint"),
        ({"retries": -1}, "'retries' of endpoint"),
        ({"concurrency": 0}, "'concurrency' of endpoint"),
        ({"max_requests": 0}, "'max_requests' of endpoint"),
    ],
)
def test_options_out_of_range_are_refused(options, says) -> None:
    with pytest.raises(UsageError, match=says) as error:
        Endpoint(**{"url": "http://x/v1", "model": "tiny"} | options)
    assert "secret" not in str(error.value)


@pytest.mark.slow
def test_a_real_server_answers_as_the_model_in_memory(tmp_path) -> None:
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"`transformers serve` needs {', '.join(missing)}: pip install 'transformers[serving]'")
    folder, prompts = tmp_path / "tiny", some_prompts(5)
    model, tokenizer = make("llama"), chat_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "serve.log").open("wb") as output:
        server = subprocess.Popen([*command, *options], stdout=output, stderr=output)
        try:
            endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", str(folder), retries=9, backoff=0.5, concurrency=1)
            found = answer_at(endpoint, prompts, max_new_tokens=8, log=tmp_path / "run.jsonl")
        except RunFailure:
            print((tmp_path / "serve.log").read_text()[-3000:])
            raise
        finally:
            server.terminate()
            server.wait(20)
    assert [one.text.split() for one in found] == [
        one.text.split() for one in answer(model, tokenizer, prompts, max_new_tokens=8)
    ]


def test_impossible_decoding_is_refused_before_anything_is_asked(tmp_path) -> None:
    with pytest.raises(InvalidParameter, match="'samples' of decoding must be 1"):
        answer_at(Endpoint("http://x/v1", "tiny"), some_prompts(), samples=2, log=tmp_path / "run.jsonl")
    assert not list(tmp_path.iterdir())
