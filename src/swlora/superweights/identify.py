"""Everything that is known of a model's super weights: search, proof, and pictures' numbers.

    search -> proof of every candidate -> path, dose curve and texts of the leading one

The result is one dict of plain values: report, figures and tables are made from it alone. Where no
candidate is proved, that is the answer, and the leading one is the largest spike that was found.
"""

import hashlib
from dataclasses import asdict
from math import exp
from typing import Any

from swlora.config import IdentifySpec
from swlora.data.known_tokens import check_prompts
from swlora.errors import UserError
from swlora.models.anatomy import Anatomy, WeightAddress, n_embeddings
from swlora.models.load import LoadedModel
from swlora.progress import Progress, Silent
from swlora.runs import package_versions
from swlora.superweights import ablate, known, proof, search
from swlora.superweights.detect import prompt_tokens, trace
from swlora.superweights.effects import NEW_TOKENS, dose_curve, generations
from swlora.superweights.meter import Meter
from swlora.threads import adapted_threads

Result = dict[str, Any]


@adapted_threads()
def identify(
    loaded: LoadedModel, spec: IdentifySpec, *, seed: int = 0, progress: Progress | None = None
) -> Result:
    """Find candidates for super weights, ablate each beside random weights, follow the leading one.

    `layers` of the result are those of candidates that were proved, each by itself. The model is
    afterwards what it was, bit for bit. Raises UserError where prompts or text do not suit it.
    """
    progress = progress or Silent()
    check(loaded, spec)
    model, tokenizer = loaded.model, loaded.tokenizer
    windows = ablate.text_windows(tokenizer, spec.text, spec.windows, spec.window_tokens)
    check_prompts(windows.tolist(), tokenizer, n_embeddings(model))
    prompts = spec.prompt or list(search.PROMPTS)
    with progress.task("search"):
        found = search.search(model, tokenizer, prompts, max_candidates=spec.max_candidates)
    meter = Meter(model, windows)
    addresses = [finding.candidate.address for finding in found.candidates]
    proved = proof.prove(meter, addresses, n_controls=spec.controls, seed=seed, progress=progress)
    candidates = [
        _candidate(finding, of_one, len(found.settings))
        for finding, of_one in zip(found.candidates, proved.addresses, strict=True)
    ]
    lead = _leading(proved)
    short = [s.prompt for s in found.settings if len(s.tokens) + NEW_TOKENS < loaded.context_tokens]
    doses = dose_curve(meter, lead, progress=progress)
    short = list(dict.fromkeys(short))
    ends = loaded.end_token_ids
    texts = generations(model, tokenizer, short, [lead], end_token_ids=ends, progress=progress)
    verdicts = [(of_one.address, of_one.verdict) for of_one in proved.addresses]
    agreement = known.compare(loaded.name, verdicts)
    return {
        **_setup(loaded, spec, windows.tolist(), seed, prompts),
        "prompt": found.scan.prompt,
        "tokens": found.scan.tokens,
        "perplexity": proved.perplexity,
        "control_windows": proved.control_windows,
        "bootstrap": {"draws": proved.bootstrap_draws, "block_tokens": proved.block_tokens},
        "layers": sorted({c["layer"] for c in candidates if c["verdict"] != "none"}),
        "removal_layers": found.removal_layers,
        "candidates": candidates,
        "joint": _together(proved.joint),
        "joint_proven": _together(proved.joint_proven) if proved.joint_proven else None,
        "search": _search(found),
        "known": asdict(agreement) | {"said": known.describe(agreement)} if agreement else None,
        "path": _path(loaded, found, lead),
        "dose_curve": {"name": str(lead), **asdict(lead), "points": [asdict(d) for d in doses]},
        "generations": {"name": str(lead), **asdict(lead), "texts": [asdict(t) for t in texts]},
        "modules": [asdict(module) for module in found.scan.modules],
        "residual": [asdict(spike) for spike in found.scan.residual],
    }


def check(loaded: LoadedModel, spec: IdentifySpec) -> None:
    """Refuse windows and prompts that the model has no room for, before any work is done."""
    if spec.window_tokens > loaded.context_tokens:
        raise UserError(
            f"--window-tokens {spec.window_tokens} exceeds the model's context of "
            f"{loaded.context_tokens} tokens"
        )
    ablate.text_windows(loaded.tokenizer, spec.text, spec.windows, spec.window_tokens)
    for prompt in spec.prompt:
        prompt_tokens(loaded.model, loaded.tokenizer, prompt)


def _setup(
    loaded: LoadedModel,
    spec: IdentifySpec,
    windows: list[list[int]],
    seed: int,
    prompts: list[str],
) -> Result:
    """Return what is needed to do the same again."""
    return {
        "model": loaded.source,
        "model_id": loaded.name,
        "model_revision": loaded.revision,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "prompts": prompts,
        "text": str(spec.text) if spec.text else "the English sample shipped with swlora",
        "text_tokens_sha256": hashlib.sha256(str(windows).encode()).hexdigest(),
        "n_windows": spec.windows,
        "window_tokens": spec.window_tokens,
        "windows_begin_with_bos": bool(ablate.window_start(loaded.tokenizer)),
        "n_controls": spec.controls,
        "seed": seed,
        "thresholds": {
            "super": proof.SUPER_RATIO,
            "strong": proof.STRONG_RATIO,
            "control_factor": proof.CONTROL_FACTOR,
            "massive_ratio": search.MASSIVE_RATIO,
        },
        "packages": package_versions(),
    }


def _candidate(finding: search.Finding, of_one: proof.AddressProof, n_settings: int) -> Result:
    seen = asdict(finding.candidate)
    return {
        **seen.pop("address"),
        **seen,
        "round": finding.round,
        "mean_contribution": finding.mean_contribution,
        "agreement": finding.n_settings / n_settings,
        **_effect(of_one),
        "leave_one_out_ratio": of_one.leave_one_out_ratio,
        "controls": [{**asdict(c.address), "weight": c.weight} for c in of_one.controls],
    }


def _together(joint: proof.JointProof) -> Result:
    return {"addresses": [asdict(a) for a in joint.addresses], **_effect(joint)}


def _effect(effect: proof.Effect) -> Result:
    """Return ratio, interval, largest control (as a ratio, None where not measured), verdict."""
    largest = effect.largest_control_effect
    return {
        "perplexity": effect.perplexity,
        "ratio": effect.ratio,
        "interval": [effect.ratio_low, effect.ratio_high],
        "largest_control": None if largest is None else exp(largest),
        "effect_nats": effect.effect_nats,
        "control_effects_nats": list(effect.control_effects_nats),
        "verdict": effect.verdict,
    }


def _leading(proved: proof.Proof) -> WeightAddress:
    """Return the proved candidate with the largest ratio, or the search's first."""
    proven = [p for p in proved.addresses if p.verdict != "none"]
    return max(proven, key=lambda p: p.ratio).address if proven else proved.addresses[0].address


def _search(found: search.Search) -> Result:
    return {
        "outcome": found.outcome,
        "rounds": [
            {**asdict(r.address), "n_settings": r.n_settings, "ratios": r.ratios}
            for r in found.rounds
        ],
        "settings": [
            {
                "prompt": s.prompt,
                "has_bos": s.has_bos,
                "is_massive": s.is_massive,
                "activation": asdict(s.activation),
                "removal_layers": s.removal_layers,
            }
            for s in found.settings
        ],
    }


def _path(loaded: LoadedModel, found: search.Search, lead: WeightAddress) -> Result:
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
    return {
        "name": str(lead),
        **asdict(lead),
        "token": token,
        "intact": intact.path(token, channel),
        "ablated": ablated.path(token, channel),
        "others": others.amax(dim=1).tolist(),
    }
