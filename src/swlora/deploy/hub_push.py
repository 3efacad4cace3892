"""An adapter or a merged model to the Hub, in one commit: all of it or nothing."""

from dataclasses import dataclass, field
from pathlib import Path

from swlora.deploy.hub_access import check_login, check_reachable, check_repo_name, hub_errors
from swlora.deploy.hub_card import CardSources, card_for
from swlora.deploy.hub_files import CARD, adapter_contents, model_contents
from swlora.errors import UserError
from swlora.files import write_text
from swlora.plural import counted
from swlora.progress import Progress
from swlora.result_json import NO_KEY


@dataclass(frozen=True)
class PushPlan:
    """What would be published, and where; `n_bytes` are the sizes of the files by name.

    `left_out` are names in the folder that stay on this machine. `changes` say which files are
    published otherwise than they lie there, without paths of this machine; `replaced` are their
    texts. `card` is the text of README.md; `writes_card` says whether it is swlora's own, to be
    written into the folder first.
    """

    repo: str
    kind: str
    folder: Path
    n_bytes: dict[str, int]
    left_out: list[str]
    changes: list[str]
    writes_card: bool
    card: str = field(metadata=NO_KEY)
    replaced: dict[str, str] = field(metadata=NO_KEY)


@dataclass(frozen=True)
class Pushed:
    """What was published: `commit` names it for good, `url` shows it."""

    plan: PushPlan
    is_private: bool
    revision: str
    commit: str
    url: str


def plan_push(
    repo: str, adapter: Path | None, model: Path | None, sources: CardSources
) -> PushPlan:
    """Check a folder and list what of it would be published; nothing is written or sent.

    Raises UserError for a folder that is incomplete or damaged, or names folders of this machine.
    """
    check_repo_name(repo)
    if (adapter is None) == (model is None):
        raise UserError("give --adapter DIR or --model DIR, and only one of them")
    contents = adapter_contents(adapter) if adapter else model_contents(model or Path())
    card = card_for(contents, adapter, sources)
    return PushPlan(
        repo,
        contents.kind,
        contents.folder,
        n_bytes={CARD: len(card.text.encode()), **contents.n_bytes},
        left_out=contents.left_out,
        changes=[*card.changes, *contents.changes],
        writes_card=card.is_ours,
        card=card.text,
        replaced={**contents.replaced, CARD: card.text},
    )


def push(
    plan: PushPlan, *, private: bool, revision: str | None, message: str | None, progress: Progress
) -> Pushed:
    """Publish what the plan lists as one commit, in a repository that is made where there is none.

    `revision` is a branch, made where there is none. Raises UserError for what a person can put
    right, and RunFailedError where the Hub or the connection fails; then nothing was published.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_reachable()
    check_login()
    if plan.writes_card:
        write_text(plan.folder / CARD, plan.card)
    api, branch = HfApi(), revision or "main"
    with hub_errors(plan.repo, revision, writes=True):
        api.create_repo(plan.repo, private=private or None, exist_ok=True)
        is_private = bool(api.model_info(plan.repo).private)
        if private and not is_private:
            raise UserError(
                f"{plan.repo} exists and is public, and --private makes new ones only: change it "
                "in its settings on the Hub, or choose another --repo"
            )
        if branch != "main":
            api.create_branch(plan.repo, branch=branch, exist_ok=True)
        with progress.task(f"publish {counted(len(plan.n_bytes), 'file')} as {plan.repo}"):
            done = api.create_commit(
                plan.repo,
                [CommitOperationAdd(name, _content(plan, name)) for name in plan.n_bytes],
                commit_message=message or f"The {plan.kind}, published with swlora",
                revision=branch,
            )
    return Pushed(plan, is_private, branch, done.oid, f"{api.endpoint}/{plan.repo}")


def _content(plan: PushPlan, name: str) -> Path | bytes:
    text = plan.replaced.get(name)
    return plan.folder / name if text is None else text.encode()
