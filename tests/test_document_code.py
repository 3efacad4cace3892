"""Every code block of the documents does what it says: page by page, as a beginner would type it.

What is not run, and what is run in a smaller way, is in the tables below; nothing else is left out.
"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.deploy.conftest import stand_in
from tests.support.beginner import save_small_model, write_beginners_folder
from tests.support.data_files import write_rows
from tests.support.document_blocks import PAGES, ROOT, Block, Command, blocks, shapes
from tests.support.document_shell import launch, run_line, serve_for_a_visit
from tests.support.hub_stand_in import HubStandIn, Repository
from tests.support.llama_cpp import require_llama_cpp
from tests.support.small_runs import ROWS, signal_in_step

from benchmarks import scenario_picture, tree_picture
from swlora.cli import main
from swlora.deploy.llama_cpp import VARIABLE, find_llama_cpp
from swlora.models.builtin import unpacked_folder
from swlora.runs import Run

__all__ = ["stand_in"]
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

FEW_WINDOWS = "--windows 1 --window-tokens 64 --controls 10 --max-candidates 2"
FEW_TEXTS = "--eval-prompts 2 --max-new-tokens 8"
FEW_STEPS = "--max-steps 2 --train-rows 24"
# `builtin` is a tiny model (tests/support/beginner.py); what else is typed in place of a text
INSTEAD = {
    "swlora identify": f"swlora identify {FEW_WINDOWS}",
    "--windows 8": "--windows 2",
    "--path_to_model openai-community/gpt2": f"--path_to_model builtin {FEW_WINDOWS}",
    '"train_eval"': f'"train_eval" {FEW_STEPS} {FEW_TEXTS}',
    "--max-steps 10": f"--max-steps 10 --train-rows 24 {FEW_TEXTS}",
    "--split test": f"--split test {FEW_TEXTS}",
    "--layers all --output": f"--layers all {FEW_STEPS} --output",
    "--layers super": f"--layers 2 {FEW_STEPS}",  # the tiny model has no super weight
    "examples/starter.yaml": f"examples/starter.yaml {FEW_STEPS} {FEW_TEXTS}",
    "studies/e2e.yaml --dry-run": "studies/smoke.yaml --dry-run",  # of layers that the model has
    "2,11": "2,3",  # the tiny model has four layers
    "--temperature 0": "--temperature 0 --max-new-tokens 8",
    "--device cuda": "--device auto",
    "--model NAME": "--model builtin",
    "--nproc-per-node 8 -m swlora train --shard": "--nproc-per-node 2 -m swlora train --shard",
}
# What lines begin with that nothing here runs, and why
NOT_RUN = {
    "make ": "installs from the network; .ci/run runs `make test`, `make demo` takes minutes",
    ".ci/run": "runs these tests",
    ".venv/bin/python -m pytest": "runs these tests",
    ".venv/bin/ruff format": "writes into the sources",
    ". .venv/bin/activate": "changes the shell that types it",
    "pip install 'swlora[ray]'": "installs from the network",
    "bash benchmarks/gpu.sh": "minutes, and a GPU; tests/benchmarks/test_gpu.py has its parts",
    "swlora train --model builtin --dataset HuggingFaceH4/": "tests/data/test_source_hub.py has it",
    "ollama ": "Ollama is not installed; tests/deploy/test_ollama.py reads what it would",
    "llama-server ": "is not installed; `export` runs the file in llama.cpp",
    "torchrun --standalone --nproc-per-node 8 -m swlora train ...": "a form, to be filled in",
    "torchrun --nnodes 2": "two machines",
    "accelerate launch --multi_gpu": "several GPUs",
    "first=$(scontrol": "Slurm",
    "srun torchrun": "Slurm",
    "swlora compare --config studies/e2e.yaml --output runs/e2e --ray": "a Ray cluster, and hours",
}
LAUNCHED = "torchrun --standalone"  # in processes of its own, by a test of its own
# Blocks that are no code, by their beginning, and what they are. Of "printed" ones, the commands
# before them on the page have printed every line, but for figures.
SHOWN = {
    "== 1 of 3: find super weights": "what `make demo` printed in some minutes",
    "changed weights: ": "printed",
    "largest difference of logits ": "printed",
    "the cat sat ON THE": "a drawing; tests/test_documents.py makes the tree",
    "query i sees key j": "a rule; tests/test_documents.py makes the tree",
}
SERVED = "http://127.0.0.1:8000"  # Python that names it runs while the page's server does


def a_run(request: pytest.FixtureRequest) -> None:
    """Train what README trains."""
    shutil.rmtree("runs/mine", ignore_errors=True)
    main(["train", "--model", "builtin", "--dataset", "rows.jsonl", "--output", "runs/mine"])


def a_stopped_run(request: pytest.FixtureRequest) -> None:
    """Train that, and interrupt it after its second step."""
    with pytest.MonkeyPatch.context() as interrupted, pytest.raises(SystemExit):
        interrupted.setattr(Run, "append_metrics", signal_in_step(2))
        a_run(request)


def a_file_of_the_merged_model(request: pytest.FixtureRequest) -> None:
    """Give the file the name of another page's, where this page has another."""
    if Path("mine.gguf").exists():
        shutil.move("mine.gguf", "tuned.gguf")


def a_published_adapter(request: pytest.FixtureRequest) -> None:
    """Play a Hub that has one."""
    hub: HubStandIn = request.getfixturevalue("stand_in")
    weights = b"weights"
    hub.large[hashlib.sha256(weights).hexdigest()] = weights
    repository = hub.repositories["mary/my-lora"] = Repository()
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}
    repository.branches["v1"] = repository.commit("main", files, "first")


# What a line finds that the page does not make, by the whole line
GIVEN: dict[str, Callable[[pytest.FixtureRequest], None]] = {
    "swlora train --output runs/mine --resume": a_stopped_run,
    "swlora train --output runs/mine --resume --learning-rate 5e-4": a_stopped_run,
    f"{LAUNCHED} --nproc-per-node 2 -m swlora train --output runs/mine --resume": a_stopped_run,
    "swlora eval --adapter runs/mine --dataset rows.jsonl --metrics mine.py:share_of_valid_json": (
        a_run
    ),
    "swlora pull mary/my-lora --revision v1 --output adapters/mary": a_published_adapter,
    "swlora recover runs/mine --output rescued": a_stopped_run,
    "swlora eval --model builtin --adapter runs/mine --split test": a_run,
    "swlora pull mary/my-lora --output adapters/mary": a_published_adapter,
    "swlora package --ollama --gguf tuned.gguf --model merged --output ollama/tuned": (
        a_file_of_the_merged_model
    ),
}


def begins(text: str, table: dict[str, str]) -> list[str]:
    return [start for start in table if text.startswith(start)]


def all_commands() -> list[Command]:
    found = [block for page in PAGES for block in blocks(page)]
    return [
        command
        for block in found
        if not (block.is_python or block.is_rows or begins(block.text, SHOWN))
        for command in block.commands
    ]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    save_small_model(folder)
    return folder


@pytest.fixture
def beginner(
    small_model: Path, fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_java
) -> Path:
    """The folder of a beginner, which is where the test stands."""
    folder = tmp_path / "beginner"
    folder.mkdir()
    shutil.copytree(small_model, unpacked_folder())
    shutil.copy(small_model.with_name("smol.gguf"), folder)
    write_beginners_folder(folder)
    if llama_cpp := find_llama_cpp():  # which is looked for from the repository's folder on
        monkeypatch.setenv(VARIABLE, str(llama_cpp.package))
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SWLORA_E2E", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return folder


class Reader:
    """Types the code of a page, block by block; `printed` has what came of it."""

    def __init__(self, page: str, request: pytest.FixtureRequest) -> None:
        self.page, self.request, self.printed = page, request, [""]
        self.names: dict[str, Any] = {}
        self.ran: set[Block] = set()
        self.monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        self.capsys: pytest.CaptureFixture[str] = request.getfixturevalue("capsys")

    def read(self, block: Block) -> None:
        if block.is_python:
            if SERVED not in block.text:
                self.run_python(block)
        elif block.is_rows:
            rows = write_rows(Path("rows.jsonl"), ROWS)
            rows.write_text(block.text + rows.read_text())
            self.type(Command("swlora data --model builtin --dataset rows.jsonl"))
            assert any(line.split() == ["bad", "rows", "0"] for line in self.printed)
        elif found := begins(block.text, SHOWN):
            if SHOWN[found[0]] == "printed":
                self.compare(block.text.splitlines())
        else:
            for command in block.commands:
                if not begins(command.text, NOT_RUN) and not command.text.startswith(LAUNCHED):
                    self.type(command)

    def run_python(self, block: Block, address: str = SERVED) -> None:
        text = block.text.replace(SERVED, address)
        exec(compile(text, f"{block.page}:{block.line}", "exec"), self.names)
        self.ran.add(block)

    def type(self, command: Command) -> None:
        line = command.text
        if prepare := GIVEN.get(line.strip()):
            prepare(self.request)
        with self.monkeypatch.context() as patched:
            serve_for_a_visit(patched, lambda address: self.visit(address, line))
            run_line(smaller(line), patched)
        self.printed += "".join(self.capsys.readouterr()).splitlines()
        if command.shown:
            self.compare(list(command.shown))

    def compare(self, shown: list[str]) -> None:
        """Check that these lines were printed, in this order, with whatever figures."""
        printed = iter(shapes(self.printed))
        for shape in shapes(shown):
            assert shape in printed, "\n".join([f"not printed: {shape}", *shapes(self.printed)])

    def visit(self, address: str, line: str) -> None:
        """See that a server has the page's runs, and the data that it may train on."""
        with httpx2.Client(base_url=address, trust_env=False, timeout=60) as client:
            assert client.get("/").status_code == 200
            served = {model["id"] for model in client.get("/v1/models").json()["data"]}
            assert served >= {folder.parent.name for folder in Path("runs").glob("*/adapter")}
            trains = "--allow-training" in line
            assert ("rows.jsonl" in client.get("/train").text) == trains
        for block in blocks(self.page):
            if SERVED in block.text and block.is_python:
                self.run_python(block, address)
                assert self.names["model"] in served


def smaller(line: str) -> str:
    for text, other in INSTEAD.items():
        line = line.replace(text, other)
    return line


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_what_a_page_shows_works(page: str, beginner: Path, request) -> None:
    if page == "docs/deploy.md":
        require_llama_cpp()
    reader = Reader(page, request)
    for block in blocks(page):
        try:
            reader.read(block)
        except BaseException as error:
            error.add_note(f"in the block of {page}, line {block.line}:\n{block.text}")
            error.add_note("\n".join(reader.printed[-40:]))
            raise
    assert reader.ran == {block for block in blocks(page) if block.is_python}


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        command.text
        for command in all_commands()
        if command.text.startswith(LAUNCHED) and not begins(command.text, NOT_RUN)
    ],
)
def test_what_is_launched_works(line: str, beginner: Path, request) -> None:
    write_rows(Path("rows.jsonl"), 5 * ROWS)  # so that a step has a row for each process
    if prepare := GIVEN.get(line):
        prepare(request)
    launch(smaller(line), beginner)
    assert len(list(beginner.glob("**/adapter/adapter_model.safetensors"))) == 1


def test_no_table_has_an_entry_for_nothing() -> None:
    typed = [command.text for command in all_commands()]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in typed), start
    typed = [line for line in typed if not begins(line, NOT_RUN)]
    for text in INSTEAD:
        assert any(text in line for line in typed), text
    assert set(GIVEN) <= set(map(str.strip, typed))
    for start in SHOWN:
        assert any(block.text.startswith(start) for page in PAGES for block in blocks(page)), start


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_what_is_generated_for_is_the_prompt_that_was_trained(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    row = json.loads(next(re.finditer(r'^ {4}({"prompt": .*})$', text, re.M))[1])
    (command,) = re.findall(r"^ {4}swlora (generate .*)$", text, re.M)
    assert shlex.split(command)[-1] == row["prompt"]


def test_the_pictures_are_those_of_the_committed_result() -> None:
    docs = ROOT / "docs"
    result = json.loads((docs / "results" / "scenarios-quick.json").read_text(encoding="utf-8"))
    drawn = {"rates": scenario_picture.picture(result), "tree": tree_picture.picture()}
    for name, picture in drawn.items():
        assert (docs / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == picture
