"""Everything the routes share: the model by its names, prompts to tokens, texts from the model."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from swlora.config import DataSpec, RunSpec, ServeSpec
from swlora.data.encode import encode_prompts, encode_turns
from swlora.data.examples import Example
from swlora.data.sources import load_dataset
from swlora.decoding.batch import DecodeRequest
from swlora.decoding.sampling import Sampling
from swlora.errors import UserError
from swlora.models.anatomy import n_embeddings
from swlora.models.load import LoadedModel, load_model
from swlora.paths import expanded
from swlora.progress import Progress
from swlora.web.chat_turns import turns_for
from swlora.web.folders import RunFolders, public_name
from swlora.web.generation import Echo, Generation, TextRequest
from swlora.web.neutral import Message
from swlora.web.problems import ApiError
from swlora.web.prometheus import Metrics
from swlora.web.restaurant import References
from swlora.web.scheduler import Scheduler
from swlora.web.schemas import SamplingBody
from swlora.web.tickets import Limits, Ticket, Variant
from swlora.web.training.desk import TrainingDesk
from swlora.web.variants import ModelHost
from swlora.web.weights import ServedWeights

log = logging.getLogger("swlora.web")


@dataclass(frozen=True)
class Service:
    """One model at the service of many requests; `start` and `close` its scheduler around them."""

    spec: ServeSpec
    loaded: LoadedModel
    folders: RunFolders
    weights: ServedWeights
    scheduler: Scheduler
    metrics: Metrics
    references: References | None
    started_s: int
    training: TrainingDesk | None = None  # where the page may train

    @property
    def base_name(self) -> str:
        """The base model's name for clients; never a path."""
        return public_name(self.loaded.name)

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer has a template for chats."""
        return bool(getattr(self.loaded.tokenizer, "chat_template", None))

    def model_names(self) -> list[str]:
        """Return the base model's name, then those of the adapters."""
        return [self.base_name, *self.folders.adapters()]

    def variant(self, model: str, zeroed: Sequence[str] = ()) -> Variant:
        """Return the variant that a request names; ApiError where this server has no such."""
        if model not in self.model_names():
            reason = self.folders.not_served().get(model)
            why = f": its adapter is not served, since {reason}" if reason else ""
            raise ApiError(
                404,
                f"there is no such model here{why}; GET /v1/models lists them",
                param="model",
                code="model_not_found",
            )
        offered = self.weights.offered() if zeroed else {}
        if any(weight_id not in offered for weight_id in zeroed):
            raise ApiError(
                400, "this weight is not offered; GET /api/models lists them", param="zeroed"
            )
        addresses = frozenset(offered[weight_id].address for weight_id in zeroed)
        return Variant(None if model == self.base_name else model, addresses)

    async def find_variant(self, model: str, zeroed: Sequence[str] = ()) -> Variant:
        """Do what `variant` does, which may read folders, without holding up the event loop."""
        return await asyncio.to_thread(self.variant, model, zeroed)

    async def encode(self, prompt: str, variant: Variant) -> list[int]:
        """Turn a prompt into tokens as in training: with what the adapter puts behind it."""
        separator = await self.separator(prompt, variant)
        tokenizer, prompts = self.loaded.tokenizer, [Example(prompt, "")]
        return await self._encoded(lambda: encode_prompts(prompts, separator, tokenizer)[0])

    async def separator(self, prompt: str, variant: Variant) -> str:
        """Return what the adapter puts behind a prompt, if it is not there already."""
        if variant.adapter is None:
            return ""
        entry = (await asyncio.to_thread(self.folders.adapters)).get(variant.adapter)
        return "" if entry is None or prompt.endswith(entry.separator) else entry.separator

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Write a chat by the tokenizer's template (in jinja's sandbox) and turn it into tokens."""
        if not self.has_chat:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        tokenizer = self.loaded.tokenizer
        return await self._encoded(lambda: encode_turns(turns_for(tokenizer, messages), tokenizer))

    async def _encoded(self, encode: Callable[[], list[int]]) -> list[int]:
        """Tokenise in another thread: a long prompt shall not hold up the others."""
        try:
            return await asyncio.to_thread(encode)
        except UserError as error:
            raise ApiError(400, str(error)[:300], code="invalid_prompt") from error
        except Exception as error:  # a template may fail in any way
            log.warning("the prompt could not be written as tokens: %r", error)
            message = "the prompt cannot be written as tokens by this model's tokenizer"
            raise ApiError(400, message, code="invalid_prompt") from error

    def request(
        self,
        variant: Variant,
        prompt_ids: list[int],
        body: SamplingBody,
        *,
        max_tokens: int,
        n_logprobs: int | None = None,
        echo: Echo | None = None,
    ) -> TextRequest:
        """Check a request against the model's limits; ApiError where it exceeds them.

        `max_tokens` counts where the client did not say; it gives way to the limits. `echo` is
        what is given back before the new text, if anything.
        """
        n_known = n_embeddings(self.loaded.model)
        if max(prompt_ids) >= n_known:
            raise ApiError(400, f"the model knows tokens below {n_known}", param="prompt")
        room = self.loaded.context_tokens - len(prompt_ids)
        wanted = body.max_tokens
        if wanted is None:
            wanted = min(max_tokens, self.spec.max_tokens, max(1, room))
        if wanted > room:
            raise ApiError(
                400,
                f"the model's context is {self.loaded.context_tokens} tokens; the prompt has "
                f"{len(prompt_ids)} and {wanted} new ones were asked for",
                code="context_length_exceeded",
            )
        if wanted > self.spec.max_tokens:
            message = f"at most {self.spec.max_tokens} new tokens may be asked for"
            raise ApiError(400, message, param="max_tokens")
        seed = secrets.randbits(63) if body.seed is None else body.seed
        sampling = Sampling(
            body.temperature,
            body.top_p,
            body.repetition_penalty,
            seed,
            n_logprobs,
            top_k=max(0, body.top_k),
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
        )
        return TextRequest(variant, prompt_ids, wanted, sampling, body.stops, echo)

    def check_number(self, n_texts: int) -> None:
        """Raise ApiError for more texts than could ever be taken on together."""
        n_most = self.spec.max_rows + self.spec.queue
        if n_texts > n_most:
            raise ApiError(
                400,
                f"{n_texts} texts were asked for, prompts times n; this server takes {n_most}",
                code="too_many_texts",
            )

    def generate(self, requests: Sequence[TextRequest]) -> Generation:
        """Start writing texts, all or none; ApiError where too much is asked for already."""
        return Generation(self.scheduler, self.loaded.tokenizer, self.metrics, requests)

    def start(self) -> None:
        """Start the model's thread."""
        self.scheduler.start()

    def close(self) -> None:
        """End the model's thread, and looks at data; a training goes on."""
        self.scheduler.stop()
        if self.training is not None:
            self.training.close()


def service_of(request: Request) -> Service:
    """Return the service of the application that answers a request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def load_service(spec: RunSpec, progress: Progress) -> Service:
    """Load the model and the data that `spec.serve` names; UserError where they cannot be had."""
    with progress.task("load the model"):
        loaded = load_model(spec.model)
    progress.say(f"model: {loaded.source}")
    references = None
    if spec.serve.dataset is not None:
        with progress.task("load the data"):
            dataset = load_dataset(DataSpec(name=spec.serve.dataset))
            references = References.of(dataset)
        progress.say(f"references: {dataset.source}")
    training = TrainingDesk.of(spec, loaded)
    service = make_service(spec.serve, loaded, references, training)
    first = DecodeRequest(-1, [loaded.tokenizer.eos_token_id], 1)  # lays the weights out
    service.scheduler.submit([Ticket(first, Variant(), deliver=lambda _news: None)])
    return service


def make_service(
    spec: ServeSpec,
    loaded: LoadedModel,
    references: References | None = None,
    training: TrainingDesk | None = None,
) -> Service:
    """Put a service together; UserError for a model whose texts cannot be decoded together."""
    folders, metrics = RunFolders(expanded(spec.runs), public_name(loaded.name)), Metrics()
    weights = ServedWeights(loaded.model, loaded.name, folders)
    host = ModelHost(loaded, folders, weights, spec.max_rows)
    cache_tokens = int(spec.cache_gb * 1e9 / cache_bytes_per_token(loaded.model))
    limits = Limits(spec.max_rows, spec.queue, spec.deadline_s, cache_tokens)
    scheduler = Scheduler(host, limits)
    metrics.watch("waiting", "Requests that wait", lambda: scheduler.n_waiting)
    metrics.watch("active", "Texts that are being written", lambda: scheduler.n_active)
    started_s = int(time.time())
    return Service(
        spec, loaded, folders, weights, scheduler, metrics, references, started_s, training
    )


def cache_bytes_per_token(model: Any) -> int:
    """Return the memory that keys and values of one token take."""
    config = model.config
    n_heads = config.num_attention_heads
    n_key_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    itemsize = model.get_input_embeddings().weight.element_size()
    return int(2 * config.num_hidden_layers * n_key_heads * head_dim * itemsize)
