"""What is known of an evaluation before it begins: which prompts are asked, and that they fit."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swlora.data.dataset import Asked, asked_of
from swlora.errors import UserError
from swlora.job import Job
from swlora.models.provenance import tokenizer_sha256
from swlora.processes import check_alike, world

if TYPE_CHECKING:
    from swlora.evaluation.user_metrics import UserMetric


@dataclass(frozen=True)
class PreparedEvaluation:
    """What is asked of a split, and the token ids of each of its prompts."""

    asked: Asked
    prompts: list[list[int]]

    @property
    def is_chat(self) -> bool:
        """Whether some of the prompts are chats."""
        return any(example.messages for example in self.asked.examples)

    @property
    def shown_prompts(self) -> list[str]:
        """The prompts for a person to read: a text, or the turns of a chat."""
        return [
            e.prompt or "\n".join(f"{m.role}: {m.content or m.extra}" for m in e.prompt_messages)
            for e in self.asked.examples
        ]


def prepare_evaluation(job: Job, metric: "UserMetric | None" = None) -> PreparedEvaluation:
    """Return the prompts to generate for; none where all rows are documents.

    Raises UserError where there are no rows, where the model has no room for an answer, or where
    there is a `metric` but no prompt.
    """
    from swlora.data.known_tokens import check_prompts
    from swlora.evaluation.decode import fitting_prompts
    from swlora.models.anatomy import n_embeddings

    split = job.spec.data.eval_split
    sequences, example_ids = job.encoded(split).sequences, job.encoded(split).example_ids
    asked = asked_of(job.dataset.split(split), example_ids)
    if metric is not None and not asked.examples:
        raise UserError(
            f"--metrics {metric.name} needs texts, and documents have no prompts to generate from: "
            "leave it out, or name rows with prompts"
        )
    prompts = list[list[int]]()
    if asked.examples:
        model, tokenizer, truncate = job.loaded.model, job.loaded.tokenizer, job.spec.data.truncate
        prompts = fitting_prompts(
            model,
            tokenizer,
            asked.examples,
            job.dataset.separator,
            job.spec.decode,
            truncate=truncate,
        )
        check_prompts(prompts, tokenizer, n_embeddings(model))
    if world().is_shared:
        tokens = {f"{split}_tokens_sha256": sequences.sha256()}
        check_alike("data", tokens | {"tokenizer_sha256": tokenizer_sha256(job.loaded.tokenizer)})
    return PreparedEvaluation(asked, prompts)
