"""Rewrites a prompt with an OpenAI-compatible endpoint (`POST .../chat/completions`), whose answer is not trusted.

The key goes to the given address and nowhere else: no redirects, no proxies or credentials from the environment.
Errors do not quote the endpoint's answer, since it may contain the key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx

from skyreels_v3.enhancer.question import EnhancerError, Question
from skyreels_v3.request import ENHANCER_KEY

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
TOTAL_SECONDS = 120.0  # for all tries
WAITS = (1.0, 3.0)  # seconds before the second and third try
MAX_BYTES = 1 << 20  # of an answer
MAX_TOKENS = 1024


def ask_remote(url: str, model: str, question: Question) -> str:
    """The answer of `model` at an endpoint; see `address_of` for `url`.

    Raises:
        EnhancerError: there is no complete answer.
    """
    logger.info("asking %s at %s for a better prompt", model, urlsplit(url).netloc)
    pictures = [{"type": "image_url", "image_url": {"url": each}} for each in question.urls]
    content: Any = [*pictures, {"type": "text", "text": question.prompt}] if pictures else question.prompt
    messages = [{"role": "system", "content": question.rules}, {"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    try:
        return text_of(asyncio.run(post(address_of(url), body)))
    except TimeoutError as error:
        raise EnhancerError(f"no answer within {TOTAL_SECONDS:g} s") from error


def address_of(url: str) -> str:
    """The address to post to: `url` may be all of it, the part before /chat/completions, or only a host."""
    address = url.rstrip("/")
    if address.endswith("/chat/completions"):
        return address
    return f"{address}{'' if urlsplit(address).path else '/v1'}/chat/completions"


async def post(address: str, body: dict[str, Any]) -> bytes:
    """Post a request, retrying after transient errors; returns the body of a 200 response."""
    key = os.environ.get(ENHANCER_KEY)
    headers = {"User-Agent": "skyreels-v3", "Accept": "application/json", "Accept-Encoding": "identity"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    client = httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=timeout, headers=headers)
    async with asyncio.timeout(TOTAL_SECONDS), client:
        for wait in (*WAITS, None):
            try:
                async with client.stream("POST", address, json=body) as response:
                    if response.status_code == HTTPStatus.OK:
                        return await read(response)
                    problem, passing = describe(response), response.status_code == 429 or response.is_server_error
            except httpx.TransportError as error:
                problem, passing = f"the endpoint cannot be reached ({type(error).__name__})", True
            if wait is None or not passing:
                break
            logger.debug("%s; trying again in %g s", problem, wait)
            await asyncio.sleep(wait)
    raise EnhancerError(problem)


def describe(response: httpx.Response) -> str:
    """What a response other than 200 means."""
    status = response.status_code
    phrase = HTTPStatus(status).phrase if status in {*HTTPStatus} else ""
    remedy = ""
    if response.is_redirect:
        remedy = ", which is not followed: give the final address"
    elif status in (401, 403):
        remedy = f": set {ENHANCER_KEY} to its key"
    return f"the endpoint answers {status} {phrase}".rstrip() + remedy


async def read(response: httpx.Response) -> bytes:
    """Read the body, up to `MAX_BYTES`."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":  # maybe a compression bomb
        raise EnhancerError("the endpoint's answer is compressed")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_BYTES:
            raise EnhancerError(f"the endpoint's answer is larger than {MAX_BYTES >> 10} KiB")
    return bytes(content)


def text_of(content: bytes) -> str:
    """The text of a chat completion; raises EnhancerError if it is not complete."""
    try:
        choice = json.loads(content)["choices"][0]
        reason, text = choice["finish_reason"], choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise EnhancerError("the endpoint's answer is not a chat completion") from error
    if reason != "stop" or not isinstance(text, str):
        cut = f", cut off after {MAX_TOKENS} tokens" if reason == "length" else ""
        raise EnhancerError(f"the endpoint's answer is not complete{cut}")
    return text
