"""Language models: questions with the form of their answers, asked several at a time.

An endpoint that speaks OpenAI's API (`Endpoint`), or a model of transformers on this machine (`Local`). The endpoint's
client is openai's own; it waits and tries again after a time-out, a lost connection, 429 (as long as it says) and 5xx.
An answer that can't be used is no error here: it comes back with what is wrong with it, and the caller asks anew.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..errors import UserError, one_line
from ..formats.header import parse_json

INSTALL = "pip install l2p_fast[data]"
FORMS = ("json_schema", "json_object", "")  # how an answer's form is asked for, the strictest first


class Question(NamedTuple):
    """Instructions, a task, and the JSON schema of the answer; ``key`` is the caller's."""

    key: Any
    rules: str
    task: str
    schema: dict[str, Any]
    seed: int = 0

    def messages(self) -> list[dict[str, str]]:
        form = "Answer with JSON alone, of this schema: " + json.dumps(self.schema)
        return [{"role": "system", "content": f"{self.rules}\n\n{form}"}, {"role": "user", "content": self.task}]


class Answer(NamedTuple):
    """What came: a value of the question's schema, or ``problem``."""

    key: Any
    value: Any
    problem: str = ""


class Unanswered(Exception):
    """A question got no answer, though it was asked as often as is sensible."""


@dataclass
class Usage:
    """What was asked and paid so far."""

    requests: int = 0
    unusable: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self) -> float:
        """In the currency of the prices, which are for a million tokens."""
        return (self.tokens_in * self.price_in + self.tokens_out * self.price_out) / 1e6

    def line(self) -> str:
        words = f"{self.requests} requests, {self.unusable} of them without a usable answer"
        words += f"; {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        return words + (f"; cost {self.cost():.4f}" if self.price_in or self.price_out else "")


class Model(Protocol):
    """What answers questions."""

    name: str
    concurrency: int
    usage: Usage

    def ask(self, question: Question) -> str:
        """The answer's text.

        Raises:
            Unanswered: none came.
            UserError: none will come.
        """

    def close(self) -> None: ...


class Endpoint:
    """A server that speaks OpenAI's API.

    Args:
        url: the part before ``/chat/completions``, as in ``http://127.0.0.1:8000/v1``.
        name: of the model.
        key: name of the environment variable that holds the key; it may be unset.
        concurrency: requests at a time.
        per_minute: requests a minute at most; 0: no limit.
        timeout: seconds for a request.
        retries: of a request, by the client, with growing pauses.
        prices: of a million tokens in and out.

    Raises:
        UserError: the package openai is missing, or the URL is none.
    """

    def __init__(
        self, url: str, name: str, key: str = "OPENAI_API_KEY", concurrency: int = 8, per_minute: float = 0,
        timeout: float = 60.0, retries: int = 5, temperature: float = 1.0, prices: tuple[float, float] = (0.0, 0.0),
    ):  # fmt: skip
        try:
            import openai
        except ImportError as error:
            raise UserError(f"an endpoint needs the package openai: {INSTALL}") from error
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
            raise UserError(f"--endpoint must be a URL such as http://127.0.0.1:8000/v1, got {url[:80]!r}")
        self.name, self.concurrency, self.temperature = name, concurrency, temperature
        self.usage = Usage(price_in=prices[0], price_out=prices[1])
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get(key) or "none", timeout=timeout, max_retries=retries
        )
        self._pause, self._next, self._form = (60 / per_minute if per_minute else 0.0), 0.0, 0
        self._lock, self._key = threading.Lock(), key

    def _pace(self) -> None:
        """Wait for this request's turn."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._pause
        time.sleep(max(0.0, turn - time.monotonic()))

    def ask(self, question: Question) -> str:
        import openai

        while True:
            form = self._form
            try:
                return self._ask_once(question, FORMS[form])
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                words = str(error)
                if not FORMS[form] or not re.search("response_format|json|schema|structured", words, re.I):
                    raise UserError(f"the endpoint refused the request: {short(words)}") from error
                with self._lock:
                    self._form = max(self._form, form + 1)
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise UserError(f"the endpoint refused the key in {self._key}: {short(error)}") from error
            except openai.NotFoundError as error:
                raise UserError(f"the endpoint knows no model {self.name!r} there: {short(error)}") from error
            except openai.RateLimitError as error:
                if "quota" in str(error).lower():
                    raise UserError(f"the endpoint's quota is used up: {short(error)}") from error
                raise Unanswered("429, too many requests") from error
            except openai.APITimeoutError as error:
                raise Unanswered("no answer in time") from error
            except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
                raise Unanswered(short(error) or type(error).__name__) from error

    def _ask_once(self, question: Question, form: str) -> str:
        self._pace()
        options: dict[str, Any] = {}
        if form:
            options["response_format"] = {"type": form}
        if form == "json_schema":
            options["response_format"]["json_schema"] = {"name": "answer", "strict": True, "schema": question.schema}
        reply = self._client.chat.completions.create(
            model=self.name,
            messages=question.messages(),
            seed=question.seed,
            temperature=self.temperature,
            **options,
        )
        used = getattr(reply, "usage", None)
        with self._lock:
            self.usage.tokens_in += getattr(used, "prompt_tokens", 0) or 0
            self.usage.tokens_out += getattr(used, "completion_tokens", 0) or 0
        choices = getattr(reply, "choices", None)
        if not choices or not isinstance(choices[0].message.content, str):
            raise Unanswered("an answer without text")
        return choices[0].message.content

    def close(self) -> None:
        self._client.close()


class Local:
    """A chat model of transformers, in a folder; one question at a time.

    Raises:
        UserError: no such folder, or no model in it.
    """

    concurrency = 1

    def __init__(self, folder: str, device: str = "auto", temperature: float = 1.0, longest: int = 2048):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not os.path.isdir(folder):
            raise UserError(f"--local {folder} is not a folder; give one with a transformers model and its tokenizer")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"can't load a language model from {folder}: {short(error)}") from error
        if not self._tokenizer.chat_template:
            raise UserError(f"the tokenizer in {folder} has no chat template; give a chat model")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(device).eval()
        self.name = os.path.basename(os.path.abspath(folder))
        self.temperature, self.longest, self.usage = temperature, longest, Usage()

    def ask(self, question: Question) -> str:
        import torch

        torch.manual_seed(question.seed)
        tokens = self._tokenizer.apply_chat_template(
            question.messages(), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        choice = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with torch.inference_mode():
            out = self._model.generate(**tokens, max_new_tokens=self.longest, **choice)
        new = out[0, tokens["input_ids"].shape[1] :]
        self.usage.tokens_in += tokens["input_ids"].shape[1]
        self.usage.tokens_out += len(new)
        return self._tokenizer.decode(new, skip_special_tokens=True)

    def close(self) -> None:
        pass


def ask_all(model: Model, questions: Iterable[Question]) -> Iterator[Answer]:
    """The answers, as they come.

    Raises:
        UserError: none will come: a wrong key or model, or the first questions all went unanswered.
    """
    pool, source = ThreadPoolExecutor(model.concurrency), iter(questions)
    pending: set[Future[Answer]] = set()
    usable, patience = False, 2 * model.concurrency + 2
    try:
        while True:
            while len(pending) < 2 * model.concurrency and (question := next(source, None)) is not None:
                pending.add(pool.submit(_answer, model, question))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                answer = future.result()
                model.usage.requests += 1
                model.usage.unusable += bool(answer.problem)
                usable |= not answer.problem
                if not usable and model.usage.unusable >= patience:
                    raise UserError(
                        f"the first {patience} requests got no usable answer ({answer.problem}); check the model"
                    )
                yield answer
    except BaseException:
        model.close()  # requests that are under way end
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _answer(model: Model, question: Question) -> Answer:
    try:
        text = model.ask(question)
        return Answer(question.key, read_answer(text, question.schema))
    except (Unanswered, ValueError) as error:
        if isinstance(error, UserError):
            raise
        return Answer(question.key, None, str(error))


def read_answer(text: str, schema: dict[str, Any]) -> Any:
    """The JSON in an answer, which may stand between other words.

    Raises:
        ValueError: there is none, or it has not the form of ``schema``.
    """
    import jsonschema

    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ValueError("an answer without JSON, or half of one")
    try:
        value = parse_json(text[start : end + 1])
    except ValueError as error:
        raise ValueError("an answer of broken JSON") from error
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError as error:
        raise ValueError(f"an answer of another form: {short(error.message)}") from error
    return value


def short(error: object) -> str:
    """A message in one line that is not too long."""
    return one_line(str(error))[:200]
