"""Fixtures that several test files share: real data where it is, tiny models everywhere."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Waiting threads sleep: spinning ones bring a busy machine to a halt.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One thread: tiny models gain nothing from more, and no test hangs on how busy the machine is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BOS, EOS = 256, 257
N_EMBEDDINGS = 264  # more than the tokenizer's 258, as in real models
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)

# Three blocks. Weights are not square, so that a transposed access cannot pass unseen.
_COMMON = {
    "vocab_size": N_EMBEDDINGS,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.2,
}
_LLAMA = {**_COMMON, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8}
_LLAMA_SHAPED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "phi3")
TINY: dict[str, dict[str, Any]] = {
    **dict.fromkeys((*_LLAMA_SHAPED, "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "gpt2": {
        "vocab_size": N_EMBEDDINGS,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.2,
    },
    "gpt_neox": {**_COMMON, "intermediate_size": 40},
    "opt": {**_COMMON, "ffn_dim": 40, "word_embed_proj_dim": 24},
    "falcon": {**_COMMON, "ffn_hidden_size": 40, "new_decoder_architecture": False},
    # Experts as slices of 3-D parameters; the middle block of qwen3_moe has a plain MLP
    "mixtral": {**_LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {**_LLAMA, "head_dim": 6, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA,
        "moe_intermediate_size": 28,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
}


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the real E2E data, the golden scores and GPT-2's tokenizer."""
    folder = Path(os.environ.get("SWLORA_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "e2e-dataset").is_dir():
        pytest.skip(f"no real data: {folder} is absent (set SWLORA_SHARED to the folder)")
    return folder


@pytest.fixture(scope="session")
def builtin_dir() -> Path:
    """The unpacked embedded model; `make test` prepares it, since tests have no network."""
    from swlora.models.builtin import unpacked_folder

    folder = unpacked_folder()
    if not folder.is_dir():
        command = "python -c 'from swlora.models.builtin import builtin_folder; builtin_folder()'"
        pytest.skip(f"the embedded model is not in {folder}; {command} fetches it")
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the package caches out of the user's own folder."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def fresh_cache(own_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache folder of this test alone, not yet made."""
    monkeypatch.setenv("SWLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_fixed_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept states are computed in groups of a few sequences, so that small data have several."""
    from swlora.data import fixed_groups

    monkeypatch.setattr(fixed_groups, "GROUP_NODES", 20)
    monkeypatch.setattr(fixed_groups, "MAX_REPEATED_SHARE", 1)


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java takes ten seconds to say what tests of the scores say anyway."""
    from swlora.evaluation import scores

    monkeypatch.setattr(scores, "missing_java", lambda: "Java is left out here")


@pytest.fixture(autouse=True)
def few_threads(request: pytest.FixtureRequest) -> None:
    """Run tiny models on one thread: threads that wait for each other cost more than the work.

    Slow tests have this process's share of the cores, beside the others that run tests.
    """
    import torch

    is_slow = request.node.get_closest_marker("slow") is not None
    n_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_processes) if is_slow else 1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer: id = byte value, <s> = 256, </s> = 257, with a chat template."""
    from tests.support.tokenizers import byte_level_core
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    core = byte_level_core()
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def bos_tokenizer(tiny_tokenizer: Any) -> Callable[..., Any]:
    """A function says_so=True -> the same tokenizer, but one that puts BOS before every text,
    whatever its attribute says.
    """
    from tokenizers.processors import TemplateProcessing

    def make(*, says_so: bool = True) -> Any:
        other = copy.deepcopy(tiny_tokenizer)
        other.add_bos_token = says_so
        other.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
        assert other.add_bos_token == says_so
        assert other("x").input_ids == [BOS, ord("x")]
        return other

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A function (model_type, seed=0, **changes) -> a fresh tiny model in eval mode, frozen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(model_type: str, seed: int = 0, **changes: Any) -> Any:
        config = AutoConfig.for_model(model_type, **TINY[model_type] | changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def model_folder(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function model_type -> the folder of that tiny model and its tokenizer; do not write."""
    folders: dict[str, Path] = {}

    def saved(model_type: str) -> Path:
        if model_type not in folders:
            folder = tmp_path_factory.mktemp(model_type)
            make_model(model_type).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            folders[model_type] = folder
        return folders[model_type]

    return saved
