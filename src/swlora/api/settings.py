"""The settings of Python's functions as typed keyword arguments.

Made from the configuration by `make settings`, and held equal to it by a test: do not edit.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Literal, TypedDict


class _Model(TypedDict, total=False):
    model: str | PathLike[str]
    """Hub id, folder, .gguf or builtin (offline, the default is builtin) [default:
    openai-community/gpt2]"""


class _Tokenizer(TypedDict, total=False):
    tokenizer: str | PathLike[str] | None
    """Hub id or folder, where it is not the model's"""
    revision: str | None
    """commit, tag or branch on the Hub"""


class _Dtype(TypedDict, total=False):
    dtype: Literal["auto", "float32", "bfloat16"]
    """auto, float32 or bfloat16 [default: auto]"""
    frozen: Literal["gguf", "dequantised"] | None
    """gguf or dequantised; weights of a .gguf file: gguf: as they lie in it, mapped; dequantised
    [default: gguf above 1 GB]"""
    device: str
    """auto, cpu, cuda or cuda:N [default: auto]"""
    memory_gb: float | None
    """memory beside the weights: for the steps of a training, which are run in smaller parts where
    they need more, and for copies of weights, which make products faster; 0: no copies [default:
    three quarters of what is free, of which copies get few or none where steps run many tokens at
    once]"""


class _Threads(TypedDict, total=False):
    threads: int | None
    """CPU threads [default: the cores that other programs leave free]"""


class _Dataset(TypedDict, total=False):
    dataset: str | PathLike[str]
    """file, folder or pattern of files, Hub id, or sample (offline, the default is sample)
    [default: tuetschek/e2e_nlg]"""
    eval_file: str | PathLike[str] | None
    """rows to evaluate on, for files and data of the Hub"""
    eval_share: float | None
    """share of the prompts to hold out, where there is no dev split [default: 0.05]"""
    split: Literal["dev", "test"]
    """dev or test [default: dev]"""
    eval_prompts: int | None
    """use the first N distinct prompts only"""
    train_split: str
    """the split to train on, of data of the Hub [default: train]"""
    config_name: str | None
    """the configuration, of the Hub's"""
    dataset_revision: str | None
    """branch, tag or commit, of the Hub's"""
    columns: str | Sequence[str]
    """columns that have other names, such as prompt=question,completion=answer (fields: prompt,
    completion; messages; conversations; instruction, input, output; text)"""
    prompt_column: str
    """same as --columns prompt=... [default: prompt]"""
    completion_column: str
    """same as --columns completion=... [default: completion]"""
    train_on: Literal["all-turns", "last-turn"]
    """all-turns or last-turn; of chats, train every answer or the last one [default: all-turns]"""
    skip_bad_rows: bool
    """[default: False]"""
    truncate: bool
    """shorten long rows: a chat's oldest turns, a prompt's middle [default: False]"""


class _TrainRows(TypedDict, total=False):
    train_rows: int | None
    """use the first N training rows only"""
    train_prompts: int | None
    """use the rows of the first N distinct training prompts only: they share work"""


class _English(TypedDict, total=False):
    english: bool | None
    """also measure perplexity of English text, to see what was forgotten [default: with E2E data
    and the sample]"""


class _Method(TypedDict, total=False):
    method: Literal["lora", "lora+", "dora", "adalora", "pissa", "rslora", "full", "supertuning"]
    """lora, lora+, dora, adalora, pissa, rslora, full or supertuning [default: lora]"""
    rank: int
    """adalora: the mean in the end [default: 4]"""
    alpha: float
    """[default: 32.0]"""
    dropout: float
    """[default: 0.0]"""
    lora_plus_ratio: float | None
    """lora+: B's learning rate over A's [default: 16]"""
    sparsity: float | None
    """supertuning: share left frozen [default: 0.99]"""
    targets: str | Sequence[str]
    """all-linear, or names of projections: q_proj,v_proj [default: all-linear]"""
    layers: str | int | Sequence[int | str]
    """all, super (found and proved first), super+removal, auto:0.5 (half of the time, or all where
    a trial finds that worse), last:4, first:4, every:4 (evenly spaced), random:4:SEED, 2,11
    [default: all]"""
    adapter: str | PathLike[str] | None
    """adapter or run folder to start from: method, size and place are its own, the model too where
    --model is not given [default: a new adapter]"""


class _Epochs(TypedDict, total=False):
    epochs: int | None
    """passes over the training rows [default: 3 where there are fewer than 2,000, else 1]"""
    batch_size: int | None
    """examples per optimizer step [default: 16, fewer where that makes less than 20 steps]"""
    learning_rate: float | None
    """higher in few layers [default: lora 0.001, lora+ 5e-05, dora 0.001, adalora 0.008, pissa
    0.0003, rslora 0.0005, full 5e-05, supertuning 0.004]"""
    find_learning_rate: bool
    """try rates in short trainings first, and take what they foresee as the best [default:
    False]"""
    schedule: Literal["linear", "cosine", "constant"]
    """linear, cosine or constant [default: linear]"""
    warmup_fraction: float
    """[default: 0.05]"""
    weight_decay: float
    """[default: 0.0]"""
    max_grad_norm: float
    """[default: 1.0]"""
    label_smoothing: float
    """[default: 0.0]"""
    max_steps: int | None
    """stop the schedule after N steps"""
    engine: Literal["auto", "tree", "plain"]
    """auto, tree or plain; tree: same gradient, less work; plain: padded batches [default: auto]"""
    order: Literal["prompts", "pairs", "neighbours", "iid"]
    """prompts, pairs, neighbours or iid; what shares a step: a prompt's examples, two of a prompt,
    also like prompts, any [default: prompts]"""
    row_tokens: int
    """tokens that are run at once [default: 4096]"""
    cache_gb: float
    """disk, where it is free, for states below the lowest adapted layer; 0: none [default: 8.0]"""
    save_every: str | None
    """how often a checkpoint is written, such as 500steps or 30s [default: 5min]"""
    checkpoint_every_s: float | None
    """the same as a number of seconds"""
    keep_checkpoints: int
    """how many are kept; a run goes on from the newest whole one [default: 2]"""
    eval_every_steps: int | None
    """measure the loss on held-out rows every N steps and keep the best adapter; 0: never [default:
    a few times, on few rows]"""
    eval_rows: int | None
    """measure it on the first N rows of --split [default: all with --eval-every-steps, else few]"""
    early_stopping: int | None
    """stop when N measurements of the held-out loss in a row were no better; keep the best
    adapter"""
    report_to: str | Sequence[str]
    """tensorboard, trackio, wandb or mlflow; trackers that are sent settings, losses and rates:
    tensorboard, trackio (local, both in swlora[track]), wandb, mlflow"""
    project: str | None
    """the project in the trackers of --report-to [default: swlora]"""
    sample_prompts: str | Sequence[str]
    """prompts that are continued (of chats: answered) at every measurement of the held-out loss,
    greedily: a text, which may be repeated, or a file with one on each line"""
    sample_every: int
    """with --sample-prompts: at every N-th measurement only [default: 1]"""
    sample_tokens: int
    """with --sample-prompts: new tokens at most [default: 64]"""
    shard: bool
    """divide the model's frozen weights over the processes that torchrun started (FSDP2), for
    models that do not fit one device [default: False]"""
    on_nonfinite: str
    """what to do where the loss of a step or its gradient is not finite: stop, or skip:N, leave the
    weights as they are in N steps of the training at most [default: stop]"""


class _EvalBatchSize(TypedDict, total=False):
    eval_batch_size: int
    """texts at once, a prompt's beams counted [default: 96]"""


class _MaxNewTokens(TypedDict, total=False):
    max_new_tokens: int
    """[default: 96]"""
    num_beams: int
    """[default: 1]"""
    length_penalty: float
    """[default: 1.0]"""
    no_repeat_ngram_size: int
    """[default: 0]"""
    temperature: float
    """0 is greedy [default: 0.0]"""
    top_p: float
    """[default: 1.0]"""


class _Prompt(TypedDict, total=False):
    prompt: str | Sequence[str]
    """text to search with; may be repeated [default: several]"""
    max_candidates: int
    """[default: 8]"""
    controls: int
    """other weights zeroed to compare, for each candidate [default: 20]"""
    text: str | PathLike[str] | None
    """plain text for perplexity; default: the shipped one"""
    windows: int
    """windows of text whose perplexity is measured [default: 4]"""
    window_tokens: int
    """[default: 512]"""
    deep: bool
    """of proved weights also: text at every dose, and int8 and int4 rounding with and without them
    held out; takes about twice as long [default: False]"""


class _Seed(TypedDict, total=False):
    seed: int
    """[default: 0]"""


class IdentifySettings(_Model, _Tokenizer, _Dtype, _Threads, _Prompt, _Seed, total=False):
    """The settings that `swlora.identify` takes."""


class TrainSettings(
    _Model,
    _Tokenizer,
    _Dtype,
    _Threads,
    _Dataset,
    _TrainRows,
    _Method,
    _Epochs,
    _Prompt,
    _Seed,
    total=False,
):
    """The settings that `swlora.train` takes."""


class EvalSettings(
    _Tokenizer,
    _Dtype,
    _Threads,
    _Dataset,
    _English,
    _EvalBatchSize,
    _MaxNewTokens,
    _Seed,
    total=False,
):
    """The settings that `swlora.evaluate` takes."""


class GenerateSettings(_Tokenizer, _Dtype, _Threads, _MaxNewTokens, _Seed, total=False):
    """The settings that `swlora.generate` takes."""


class LoadSettings(_Model, _Tokenizer, _Dtype, _Threads, total=False):
    """The settings that `swlora.load` takes."""


class MergeSettings(_Model, _Tokenizer, total=False):
    """The settings that `swlora.merge` takes."""


class ExportSettings(_Model, _Tokenizer, _Threads, total=False):
    """The settings that `swlora.export` takes."""
