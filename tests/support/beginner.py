"""What a beginner has who follows the documents: the repository, rows, and a model to train.

The model is tiny and lies where the embedded one is kept, so that it is the one called `builtin`.
"""

import csv
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tests.support.chat_families import FAMILIES
from tests.support.data_files import write_e2e, write_rows
from tests.support.document_blocks import ROOT
from tests.support.gguf_models import N_MERGES, bpe_tokenizer, tiny_model
from tests.support.small_runs import DEV, ROWS
from transformers import AutoConfig, AutoTokenizer

from swlora.deploy.gguf_write import ModelParts, write_gguf
from swlora.models.weight_source import open_weights
from swlora.progress import Silent

BOS, EOS = "<|im_start|>", "<|im_end|>"
# Widths that q8_0 takes; room for the rows of the sample at nearly a token for each byte
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
}
IN_FOLDER = ("examples", "studies", "train_eval_pipeline", "super_weights_identification")
CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in turns]}
    for turns in (
        [
            ("system", "Be brief."),
            *(("user", "A colour?"), ("assistant", "Blue.")),
            *(("user", "Another."), ("assistant", "Red.")),
        ],
        [("system", "Be brief."), ("user", "A number?"), ("assistant", "Two.")],
        [("user", "A letter?"), ("assistant", "")],
        [("user", "A bird?"), ("assistant", "An owl.")],
    )
]
METRIC = '''
import json

def share_of_valid_json(predictions, references):
    """Say how many of the texts are JSON."""
    def is_json(text):
        try:
            json.loads(text)
        except ValueError:
            return False
        return True
    return sum(map(is_json, predictions)) / len(predictions)
'''


def save_small_model(folder: Path) -> None:
    """Save a tiny Llama with SmolLM2's chats, and the same as GGUF in `smol.gguf` beside it."""
    tokenizer = bpe_tokenizer(BOS, EOS, FAMILIES["SmolLM2"])
    ends = {"bos_token_id": 256 + N_MERGES, "eos_token_id": 257 + N_MERGES}
    model = tiny_model("llama", **SIZES, **ends, pad_token_id=ends["eos_token_id"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    parts = ModelParts(config, tokenizer, open_weights(folder), model.generation_config)
    write_gguf(parts, folder.parent / "smol.gguf", "f16", "smol", Silent())


def write_beginners_folder(folder: Path) -> None:
    """Write the repository's folders that commands name, and data under the documents' names."""
    for name in IN_FOLDER:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "data" / "rows.jsonl", ROWS)
    write_rows(folder / "more.jsonl", ROWS[:6] + DEV)
    write_rows(folder / "chats.jsonl", CHATS)
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "question", "answer"])
        writer.writerows(2 * [row["prompt"], row["completion"]] for row in ROWS)
    (folder / "shards").mkdir()
    for number in range(2):
        table = pyarrow.Table.from_pylist(ROWS[number::2])
        pyarrow.parquet.write_table(table, folder / "shards" / f"{number}.parquet")
    (folder / "prompts.txt").write_text("name[A], food[x]\nname[F], food[z]\n", encoding="utf-8")
    (folder / "mine.py").write_text(METRIC, encoding="utf-8")
    write_e2e(folder / "e2e-dataset")
    shutil.copy(folder / "e2e-dataset" / "testset_w_refs.csv", folder)
    (folder / "out.txt").write_text("É.\nF.\n", encoding="utf-8")  # for its two MRs
