"""What an identification found, as values: report, figures and result.json are made from it."""

from dataclasses import dataclass, field
from pathlib import Path

from swlora.models.anatomy import WeightAddress
from swlora.result_json import FLAT, IF_ANY
from swlora.superweights.detect import Candidate, ModuleScan, Spike
from swlora.superweights.effects import Dose, Generation
from swlora.superweights.known import Agreement
from swlora.superweights.mechanism import Mechanism
from swlora.superweights.proof import AddressProof, JointProof, Verdict
from swlora.superweights.search import Activation, Search
from swlora.superweights.sinks import Sinks


@dataclass(frozen=True)
class Thresholds:
    """What a ratio must exceed for a verdict, an effect over its controls, and a massive spike."""

    super: float
    strong: float
    control_factor: float
    massive_ratio: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is needed to do the same again."""

    model: str
    model_id: str
    model_revision: str | None
    dtype: str
    device: str
    prompts: list[str]
    text: str
    text_tokens_sha256: str
    n_windows: int
    window_tokens: int
    windows_begin_with_bos: bool
    n_controls: int
    seed: int
    thresholds: Thresholds
    packages: dict[str, str]


@dataclass(frozen=True)
class BlockBootstrap:
    """How intervals were drawn: so many draws of blocks of so many tokens."""

    draws: int
    block_tokens: int


@dataclass(frozen=True)
class JudgedCandidate:
    """A candidate as the search saw it, and its proof; `agreement` is the share of settings."""

    seen: Candidate = field(metadata=FLAT)
    round: int | None
    mean_contribution: float
    agreement: float
    proof: AddressProof = field(metadata=FLAT)

    @property
    def address(self) -> WeightAddress:
        """Where the weight is."""
        return self.seen.address

    @property
    def is_proved(self) -> bool:
        """Whether setting it to zero, by itself, does what no random weight does."""
        return self.proof.verdict != "none"


@dataclass(frozen=True)
class ActivationPath:
    """A weight's output channel after every layer, at one token: intact, and the weight at zero.

    `others` is the largest magnitude of any other channel there, intact.
    """

    name: str
    address: WeightAddress = field(metadata=FLAT)
    token: int
    intact: list[float]
    ablated: list[float]
    others: list[float]


@dataclass(frozen=True)
class DoseCurve:
    """The text's perplexity as one weight is scaled."""

    name: str
    address: WeightAddress = field(metadata=FLAT)
    points: tuple[Dose, ...]


@dataclass(frozen=True)
class Generations:
    """Text written with the model as it is, and with one weight at zero."""

    name: str
    address: WeightAddress = field(metadata=FLAT)
    texts: tuple[Generation, ...]


@dataclass(frozen=True)
class KnownAgreement:
    """How the coordinates that were published for the model fared; `said` says it in one line."""

    agreement: Agreement = field(metadata=FLAT)
    said: str


@dataclass(frozen=True, kw_only=True)
class MovedWeight:
    """A weight that is proved before a fine-tuning, after it, or both.

    A verdict is None where the weight is no candidate of that model's own search; its ratio is
    measured there all the same.
    """

    address: WeightAddress = field(metadata=FLAT)
    weight_before: float
    weight_after: float
    ratio_before: float
    ratio_after: float
    verdict_before: Verdict | None
    verdict_after: Verdict | None


@dataclass(frozen=True)
class MovedActivation:
    """The largest activation against the median that a prompt makes, before and after."""

    prompt: str
    has_bos: bool
    before: Activation
    after: Activation


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """The model with an adapter in its weights, beside the model without.

    `weights` are those that are proved in either; `sinks` are of the whole models. `after` is what
    the search and the proof found with the adapter.
    """

    adapter: str
    weights: tuple[MovedWeight, ...]
    activations: tuple[MovedActivation, ...]
    sinks_before: Sinks
    sinks_after: Sinks
    after: "Identified"


@dataclass(frozen=True, kw_only=True)
class Identified:
    """Everything that is known of a model's super weights.

    `layers` are those of candidates that were proved, each by itself. `perplexity` is that of the
    intact model. `prompt` and `tokens` are those of the scan, whose spikes are `modules` and
    `residual`. `known` is None where nothing was published, `mechanism` where nothing was proved,
    `fine_tuned` where no adapter was named. Report and figures are None where they were not
    written.
    """

    setup: Setup = field(metadata=FLAT)
    prompt: str
    tokens: list[str]
    perplexity: float
    control_windows: int
    bootstrap: BlockBootstrap
    layers: list[int]
    removal_layers: list[int]
    candidates: tuple[JudgedCandidate, ...]
    joint: JointProof
    joint_proven: JointProof | None
    search: Search
    known: KnownAgreement | None
    path: ActivationPath
    dose_curve: DoseCurve
    generations: Generations
    modules: list[ModuleScan]
    residual: list[Spike]
    mechanism: Mechanism | None = field(default=None, metadata=IF_ANY)
    fine_tuned: FineTuned | None = field(default=None, metadata=IF_ANY)
    figure: Path | None = field(default=None, metadata=IF_ANY)
    figures: dict[str, Path] | None = field(default=None, metadata=IF_ANY)
    report: Path | None = field(default=None, metadata=IF_ANY)
