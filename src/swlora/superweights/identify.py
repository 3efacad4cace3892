"""Everything that is known of a model's super weights: search, proof, and pictures' numbers.

    search -> proof of every candidate -> path, dose curve and texts of the leading one
           -> how those that are proved work

Where no candidate is proved, that is the answer, and the leading one is the largest spike that was
found.
"""

import hashlib
from typing import Any

from torch import Tensor

from swlora.config import IdentifySpec
from swlora.data.known_tokens import check_prompts
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, n_embeddings
from swlora.models.load import LoadedModel
from swlora.models.quantised_weight import has_quantised
from swlora.processes import check_alike, team
from swlora.progress import Progress, Silent
from swlora.superweights import ablate, known, proof, search
from swlora.superweights.dealt_meter import DealtMeter
from swlora.superweights.detect import prompt_tokens, trace
from swlora.superweights.effects import NEW_TOKENS, Generation, dose_curve, generations
from swlora.superweights.findings import (
    ActivationPath,
    BlockBootstrap,
    DoseCurve,
    Generations,
    Identified,
    JudgedCandidate,
    KnownAgreement,
    Setup,
    Thresholds,
)
from swlora.superweights.mechanism import measure_mechanism
from swlora.superweights.meter import Meter
from swlora.threads import adapted_threads
from swlora.versions import package_versions


@adapted_threads()
def identify(
    loaded: LoadedModel,
    spec: IdentifySpec,
    windows: Tensor | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Identified:
    """Find candidates for super weights, ablate each beside random weights, follow the leading one.

    `windows` are what `check` gave, if asked before. `layers` of the result are those of candidates
    that were proved, each by itself. The model is afterwards what it was, bit for bit. Several
    processes make the same search, and share the measurements. Raises UserError where prompts or
    text do not suit it.
    """
    progress = progress or Silent()
    windows = check(loaded, spec) if windows is None else windows
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = spec.prompt or list(search.PROMPTS)
    with progress.task("search"):
        found = search.search(model, tokenizer, prompts, max_candidates=spec.max_candidates)
    addresses = [finding.candidate.address for finding in found.candidates]
    check_alike("candidates", {"weights": [str(address) for address in addresses]})
    meter = make_meter(model, windows)
    proved = proof.prove(meter, addresses, n_controls=spec.controls, seed=seed, progress=progress)
    candidates = _judged(found, proved)
    lead = _leading(proved)
    doses = dose_curve(meter, lead, progress=progress)
    texts = _texts(loaded, found, lead, progress)
    proven = sorted((c.address for c in candidates if c.is_proved), key=lambda a: a != lead)
    mechanism = None
    if proven:
        mechanism = measure_mechanism(
            loaded, meter, proven, prompts, deep=spec.deep, progress=progress
        )
    elif spec.deep:
        progress.say("no weight is proved: there is nothing that --deep could measure")
    return Identified(
        setup=_setup(loaded, spec, windows.tolist(), seed, prompts),
        prompt=found.scan.prompt,
        tokens=found.scan.tokens,
        perplexity=proved.perplexity,
        control_windows=proved.control_windows,
        bootstrap=BlockBootstrap(proved.bootstrap_draws, proved.block_tokens),
        layers=sorted({c.address.layer for c in candidates if c.is_proved}),
        removal_layers=found.removal_layers,
        candidates=candidates,
        joint=proved.joint,
        joint_proven=proved.joint_proven,
        search=found,
        known=_known(loaded, proved),
        path=_path(loaded, found, lead),
        dose_curve=DoseCurve(str(lead), lead, doses),
        generations=Generations(str(lead), lead, texts),
        modules=found.scan.modules,
        residual=found.scan.residual,
        mechanism=mechanism,
    )


def make_meter(model: Any, windows: Tensor) -> Meter:
    """Return a meter of a model over windows of text, which several processes share."""
    return DealtMeter(model, windows) if team().is_shared else Meter(model, windows)


def check(loaded: LoadedModel, spec: IdentifySpec) -> Tensor:
    """Refuse windows and prompts that the model has no room for, before any work is done.

    Returns the windows of text, token ids (n, window_tokens). Raises UserError.
    """
    if has_quantised(loaded.model):
        raise UserError(
            "a search for super weights sets single weights to zero, and they stay as they lie in "
            "the .gguf file; give --frozen dequantised"
        )
    if spec.window_tokens > loaded.context_tokens:
        raise UserError(
            f"--window-tokens {spec.window_tokens} exceeds the model's context of "
            f"{loaded.context_tokens} tokens"
        )
    windows = ablate.text_windows(loaded.tokenizer, spec.text, spec.windows, spec.window_tokens)
    check_prompts(windows.tolist(), loaded.tokenizer, n_embeddings(loaded.model))
    for prompt in spec.prompt:
        prompt_tokens(loaded.model, loaded.tokenizer, prompt)
    return windows


def _setup(
    loaded: LoadedModel,
    spec: IdentifySpec,
    windows: list[list[int]],
    seed: int,
    prompts: list[str],
) -> Setup:
    """Return what is needed to do the same again."""
    return Setup(
        model=loaded.source,
        model_id=loaded.name,
        model_revision=loaded.revision,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=loaded.model.device.type,
        prompts=prompts,
        text=str(spec.text) if spec.text else "the English sample shipped with swlora",
        text_tokens_sha256=hashlib.sha256(str(windows).encode()).hexdigest(),
        n_windows=spec.windows,
        window_tokens=spec.window_tokens,
        windows_begin_with_bos=bool(ablate.window_start(loaded.tokenizer)),
        n_controls=spec.controls,
        seed=seed,
        thresholds=Thresholds(
            super=proof.SUPER_RATIO,
            strong=proof.STRONG_RATIO,
            control_factor=proof.CONTROL_FACTOR,
            massive_ratio=search.MASSIVE_RATIO,
        ),
        packages=package_versions(),
    )


def _judged(found: search.Search, proved: proof.Proof) -> tuple[JudgedCandidate, ...]:
    """Return the candidates of the search, each with its proof."""
    return tuple(
        JudgedCandidate(
            finding.candidate,
            finding.round,
            finding.mean_contribution,
            finding.n_settings / len(found.settings),
            of_one,
        )
        for finding, of_one in zip(found.candidates, proved.addresses, strict=True)
    )


def _leading(proved: proof.Proof) -> WeightAddress:
    """Return the proved candidate with the largest ratio, or the search's first."""
    proven = [p for p in proved.addresses if p.verdict != "none"]
    return max(proven, key=lambda p: p.ratio).address if proven else proved.addresses[0].address


def _known(loaded: LoadedModel, proved: proof.Proof) -> KnownAgreement | None:
    """Compare with what was published for this model, None where nothing was."""
    verdicts = [(of_one.address, of_one.verdict) for of_one in proved.addresses]
    agreement = known.compare(loaded.name, verdicts)
    return KnownAgreement(agreement, known.describe(agreement)) if agreement else None


def _texts(
    loaded: LoadedModel, found: search.Search, lead: WeightAddress, progress: Progress
) -> tuple[Generation, ...]:
    """Continue the prompts that leave room for it, if any, before and after the ablation."""
    room = loaded.context_tokens - NEW_TOKENS
    prompts = list(dict.fromkeys(s.prompt for s in found.settings if len(s.tokens) < room))
    if not prompts:
        return ()
    return generations(
        loaded.model,
        loaded.tokenizer,
        prompts,
        [lead],
        end_token_ids=loaded.end_token_ids,
        progress=progress,
    )


def _path(loaded: LoadedModel, found: search.Search, lead: WeightAddress) -> ActivationPath:
    """Follow the leading candidate's output channel through the layers, intact and ablated.

    At the token of the first prompt where the channel is largest after the candidate's layer;
    `others` is the largest magnitude of any other channel there.
    """
    anatomy, channel = Anatomy(loaded.model), lead.out_channel
    token_ids = loaded.tokenizer.convert_tokens_to_ids(found.scan.tokens)
    intact = trace(anatomy, [token_ids])[0]
    with ablate.zeroed(anatomy, [lead]):
        ablated = trace(anatomy, [token_ids])[0]
    stream = intact.stream[1:]  # (L, T, D)
    token = int(stream[lead.layer, :, channel].abs().argmax())
    others = stream[:, token].abs()
    others[:, channel] = 0
    return ActivationPath(
        str(lead),
        lead,
        token,
        intact=intact.path(token, channel),
        ablated=ablated.path(token, channel),
        others=others.amax(dim=1).tolist(),
    )
