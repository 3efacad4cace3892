"""One model, many variants: adapters loaded when they are first asked for, switched by PEFT.

The base model is never changed for good: only plain LoRA is loaded (see `folders`), none of the
model's own tensors is ever read from an adapter's file, and weights at zero are put back bit for
bit. Whether that holds shows in the log-probabilities that the base model gives a few tokens. Used
by the scheduler's thread alone.
"""

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from swlora.adapters.methods import quiet_peft
from swlora.adapters.on_base import warn_of_other_base
from swlora.adapters.own_tensors import check_tensors
from swlora.adapters.own_tokenizer import other_tokens
from swlora.adapters.saved import WEIGHTS, changed_file, what_is_not_finite
from swlora.adapters.served_config import served_config
from swlora.decoding.batch import BatchDecoder, DecodeRequest
from swlora.decoding.forwards import decode_forwards
from swlora.errors import UserError
from swlora.evaluation.decode import chat_end_token_ids
from swlora.models.anatomy import context_tokens, n_embeddings
from swlora.models.identity import weights_sample_sha256
from swlora.models.load import LoadedModel
from swlora.models.module_tree import ModuleTree
from swlora.web.folders import AdapterEntry, RunFolders
from swlora.web.tickets import Decoder, Variant
from swlora.web.weights import ServedWeights

log = logging.getLogger("swlora.web")
DOES_NOT_FIT = "this adapter does not fit the model that is served"
CHECK_TOKENS = 16
TOLERANCE_FLOAT32, TOLERANCE = 1e-3, 0.25  # nats: other orders of summation, in bfloat16 too
MAX_LOADED = 8  # adapters in memory, beyond those at work
MAX_DECODERS = 8  # kept for variants that come again; an idle one holds little
PREFILL_TOKENS = 128  # run at once: between them other texts go on and a client may leave


class ModelHost:
    """The loaded model and the adapters that are in memory with it.

    Raises UserError for a model whose texts cannot be decoded together.
    """

    def __init__(
        self, loaded: LoadedModel, folders: RunFolders, weights: ServedWeights, max_slots: int
    ) -> None:
        self._tokenizer = loaded.tokenizer
        self._model, self._end_token_ids = loaded.model, chat_end_token_ids(loaded)
        self._source, self._sample = loaded.source, weights_sample_sha256(loaded.model)
        self._folders, self._weights, self._max_slots = folders, weights, max_slots
        self._peft_model: Any = None
        self._loaded: OrderedDict[str, tuple[int, str]] = OrderedDict()  # version, name in PEFT
        self._n_loads = 0
        self._decoders: OrderedDict[Variant, Decoder] = OrderedDict()
        self.decoder(Variant())
        self._copies = decode_forwards(self._model)  # of weights: held while decoders come and go
        self._tree = ModuleTree(self._model)
        self._logprobs_at_start = self._check_logprobs()

    def decoder(self, variant: Variant) -> Decoder:
        """Return an empty decoder for the variant, in whose state the model is."""
        decoder = self._decoders.pop(variant, None) or BatchDecoder(
            self._model,
            eos_token_ids=self._end_token_ids,
            max_slots=self._max_slots,
            prefill_tokens=PREFILL_TOKENS,
        )
        self._decoders[variant] = decoder
        while len(self._decoders) > MAX_DECODERS:
            self._decoders.popitem(last=False)
        return decoder

    def forget(self, variant: Variant) -> None:
        """Never return the variant's decoder again."""
        self._decoders.pop(variant, None)

    def load(self, variant: Variant, keep: Collection[Variant]) -> None:
        """Load the variant's adapter, or again where its file was replaced; forget old ones.

        Raises UserError where it is gone or does not fit.
        """
        name = variant.adapter
        if name is None:
            return
        entry = self._folders.adapters().get(name)
        if entry is None:
            raise UserError("this adapter is no longer there")
        busy = {other.adapter for other in keep}
        if name in self._loaded:
            version, _ = self._loaded[name]
            if version == entry.version or name in busy:
                self._loaded.move_to_end(name)
                return
            self._unload(name)
        for old in [n for n in self._loaded if n not in busy][: len(self._loaded) - MAX_LOADED + 1]:
            self._unload(old)
        for idle in [v for v in self._decoders if v not in keep]:
            self.forget(idle)  # made for modules that are wrapped or replaced now
        self._n_loads += 1
        inner_name = f"a{self._n_loads}"  # PEFT's names become module names: no dots
        self._loaded[name] = entry.version, inner_name
        try:
            self._add(entry, inner_name)
        except UserError:
            self._unload(name)
            raise

    def recover(self, keep: Collection[Variant]) -> bool:
        """Let go of idle adapters and decoders; say whether the base model answers as it did."""
        busy = {variant.adapter for variant in keep}
        for variant in [v for v in self._decoders if v not in keep]:
            self.forget(variant)
        for name in [name for name in self._loaded if name not in busy]:
            self._unload(name)
        return self._is_whole()

    def rebuild(self) -> bool:
        """Give every module back what it held at the start; say whether that was enough."""
        self._decoders.clear()
        self._loaded.clear()
        self._peft_model = None
        self._tree.restore()
        return self._is_whole()

    def _is_whole(self) -> bool:
        with self.switched(Variant()):
            logprobs = self._check_logprobs()
        is_float32 = self._model.dtype == torch.float32
        tolerance = TOLERANCE_FLOAT32 if is_float32 else TOLERANCE
        expected = self._logprobs_at_start
        return torch.allclose(logprobs, expected, rtol=0, atol=tolerance, equal_nan=True)

    def _check_logprobs(self) -> Tensor:
        """Return log-probabilities (n,) of some tokens in the model as it is, in nats, float64."""
        n_tokens = min(CHECK_TOKENS, n_embeddings(self._model), context_tokens(self._model))
        decoder = BatchDecoder(self._model, eos_token_ids=(), max_slots=1)
        decoder.admit([DecodeRequest(0, range(n_tokens), 1, prompt_logprobs=0)])
        (event,) = decoder.step()
        return torch.tensor([choice.logprob for choice in event.prompt[1:]], dtype=torch.float64)

    @contextmanager
    def switched(self, variant: Variant) -> Iterator[None]:
        """Put the model into the variant's state while the body runs.

        The state is set from whatever was there before, so that one that was not left as it should
        have been does no harm.
        """
        with ExitStack() as stack:
            if self._peft_model is not None:
                self._enable(variant.adapter is not None)
            if variant.adapter is not None:
                _, inner_name = self._loaded[variant.adapter]
                self._peft_model.set_adapter(inner_name, inference_mode=True)
            if variant.zeroed:
                addresses = sorted(variant.zeroed, key=str)
                stack.enter_context(self._weights.switched_off(addresses))
            yield

    def _enable(self, enabled: bool) -> None:
        for module in self._model.modules():
            if isinstance(module, BaseTunerLayer) and module.disable_adapters == enabled:
                module.enable_adapters(enabled)

    def _add(self, entry: AdapterEntry, inner_name: str) -> None:
        """Load an adapter; UserError where it does not fit. The model is whole in either case."""
        try:
            config = served_config(self._model, entry.folder)  # by the header alone: first
            check_tensors(self._model, entry.folder / WEIGHTS)
            if name := changed_file(entry.folder):
                raise UserError(f"its {name} is damaged, or was changed since it was saved")
            is_chat = entry.format == "chat"
            if said := other_tokens(
                entry.folder, self._tokenizer, is_chat=is_chat, follow_links=False
            ):
                raise UserError(said)
            if said := what_is_not_finite(entry.folder / WEIGHTS):
                raise UserError(f"it {said}")
            warn_of_other_base(entry.folder, self._source, self._sample, log.warning)
            with quiet_peft():
                if self._peft_model is None:
                    self._peft_model = PeftModelForCausalLM(self._model, config, inner_name).eval()
                else:
                    self._peft_model.add_adapter(inner_name, config)
                device = str(self._model.device)
                report = self._peft_model.load_adapter(
                    str(entry.folder), inner_name, torch_device=device
                )
        except UserError as error:
            log.warning("the adapter %s does not fit: %s", entry.name, error)
            raise UserError(f"{DOES_NOT_FIT}: {error}") from error
        except Exception as error:  # PEFT, torch and safetensors raise many kinds
            log.warning("the adapter %s does not fit: %s", entry.name, error)
            if self._peft_model is None:  # some modules may be wrapped already
                self._tree.restore()
            raise UserError(DOES_NOT_FIT) from error
        n_missing, n_extra = len(report.missing_keys), len(report.unexpected_keys)
        if n_missing or n_extra:
            log.warning(
                "the adapter %s lacks %d tensors, has %d extra", entry.name, n_missing, n_extra
            )
            raise UserError(DOES_NOT_FIT)

    def _unload(self, name: str) -> None:
        _, inner_name = self._loaded.pop(name)
        if self._peft_model is not None and inner_name in self._peft_model.peft_config:
            with quiet_peft():
                self._peft_model.delete_adapter(inner_name)
