"""A minimal endpoint in OpenAI's format, on starlette and uvicorn: an example of serving, not a server to put on a network.

python examples/http_server.py [FOLDER] [--host 127.0.0.1] [--port 8000] [--cache-tokens N] [--max-batch N] [--backend ...]

curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "ROMEO:\\n", "max_tokens": 40, "stream": true}'

POST /v1/completions and /v1/chat/completions (with a model that has a chat template), streamed or not; GET /v1/models.
Known of a request: prompt or messages, max_tokens, temperature, top_p, seed, stop, stream, logprobs; all else is passed over.
Requests of any number of clients share one running batch; a client that goes away frees its place. No authentication.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise SystemExit(print("starlette or uvicorn is not installed, nothing to show: pip install starlette uvicorn")) from None

import cupyq
from cupyq.errors import CupyqError
from cupyq.generate import encode, load_tokenizer
from cupyq.models.chat_template import ChatTemplate
from cupyq.serve import Generator, Job, SamplerSettings

MOST_BODY_BYTES = 4 << 20
REASONS = {"stop_token": "stop", "stop_string": "stop", "length": "length", "filter": "stop", "cancelled": "stop"}


class Endpoint:
    def __init__(self, folder, **options):
        self.folder = Path(folder)
        self.model = cupyq.load_model(folder, backend=options.pop("backend", "auto"))
        self.tokenizer = load_tokenizer(folder)
        self.generator = Generator(self.model, self.tokenizer, **options)
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.completions, methods=["POST"]),
            ]
        )

    @functools.cached_property
    def template(self):
        return ChatTemplate.from_folder(self.folder)

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": self.folder.name, "object": "model"}]})

    async def completions(self, request):
        is_chat = request.url.path.endswith("/chat/completions")
        try:
            body = await self._body(request)
            job = self._job(body, is_chat)
            events = self.generator.stream(job)
            first = await anext(events)  # what is wrong with the job shows here
        except (ValueError, TypeError, CupyqError) as error:
            return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)
        kind = "chat.completion" if is_chat else "text_completion"
        common = {"id": f"cmpl-{job.number}", "created": int(time.time()), "model": self.folder.name}
        if body.get("stream"):
            chunks = self._chunks(first, events, common | {"object": f"{kind}.chunk" if is_chat else kind}, is_chat)
            return StreamingResponse(chunks, media_type="text/event-stream")
        logprobs = []
        async for event in _with_first(first, events):
            logprobs += event.logprobs
        if job.reason == "error":
            return JSONResponse({"error": {"message": str(job.error), "type": "server_error"}}, status_code=500)
        choice = {"index": 0, "finish_reason": REASONS[job.reason]}
        choice |= {"message": {"role": "assistant", "content": job.text}} if is_chat else {"text": job.text}
        choice["logprobs"] = self._logprobs(logprobs) if job.logprobs is not None else None
        usage = {"prompt_tokens": len(job.prompt), "completion_tokens": len(job.tokens)}
        usage["total_tokens"] = sum(usage.values())
        return JSONResponse(common | {"object": kind, "choices": [choice], "usage": usage})

    @staticmethod
    async def _body(request):
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY_BYTES:
                raise ValueError(f"the request has more than {MOST_BODY_BYTES} bytes")
        try:
            body = json.loads(body)
        except ValueError as error:
            raise ValueError(f"the request is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise ValueError("the request must be a JSON object")
        return body

    def _job(self, body, is_chat):
        if is_chat:
            text = self.template.render(body.get("messages", []), add_generation_prompt=True)
            prompt = encode(self.tokenizer, text, special=False)
        else:
            prompt = body.get("prompt", "")
            prompt = encode(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        settings = SamplerSettings(top_k=0, temperature=1.0, top_p=1.0)
        given = {name: body[name] for name in ("temperature", "top_p") if body.get(name) is not None}
        stop = body.get("stop") or []
        logprobs = body.get("logprobs")
        if is_chat:
            logprobs = body.get("top_logprobs", 0) if logprobs else None
        most = body.get("max_completion_tokens") or body.get("max_tokens") or (self._room(prompt) if is_chat else 16)
        return Job(
            prompt,
            max_new_tokens=most,
            settings=dataclasses.replace(settings, **given),
            seed=body.get("seed"),
            stop_strings=[stop] if isinstance(stop, str) else stop,
            logprobs=logprobs,
        )

    def _room(self, prompt):
        places = min(self.model.config.max_seq_len, self.generator.pages * self.generator.page_size)
        return max(1, min(512, places - len(prompt)))

    def _logprobs(self, told):
        text = [self.tokenizer.decode([one.token]) for one in told]
        top = [{self.tokenizer.decode([token]): logprob for token, logprob in one.top.items()} for one in told]
        return {"tokens": text, "token_logprobs": [one.logprob for one in told], "top_logprobs": top}

    async def _chunks(self, first, events, common, is_chat):
        async for event in _with_first(first, events):
            if event.kind == "text" and event.text:
                choice = {"delta": {"content": event.text}} if is_chat else {"text": event.text}
            elif event.kind == "finished":
                choice = {"delta": {}} if is_chat else {"text": ""}
            else:
                continue
            choice |= {"index": 0, "finish_reason": REASONS.get(event.reason)}
            yield f"data: {json.dumps(common | {'choices': [choice]}, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"


async def _with_first(first, events):
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()  # where the client went away, the job is given up


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=Path(__file__).parent / "models/shakespeare-exl2-4.0", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cache-tokens", type=int, default=None)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
    given = parser.parse_args()
    endpoint = Endpoint(given.folder, cache_tokens=given.cache_tokens, max_batch=given.max_batch, backend=given.backend)
    uvicorn.run(endpoint.app, host=given.host, port=given.port)
