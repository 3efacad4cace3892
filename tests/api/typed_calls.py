"""What a type checker sees of calls like a person's: `make lint` reads this file, nothing runs it.

Each `type: ignore` stands for a mistake that is seen: where one is not, mypy calls it unused.
"""

from pathlib import Path
from typing import assert_type

import swlora
from swlora.deploy.gguf_export import Exported
from swlora.evaluation.evaluated import Evaluated
from swlora.evaluation.prompting import Generated
from swlora.models.load import LoadedModel
from swlora.training.trained import Trained


def stop_early(report: swlora.StepReport) -> None:
    """Be a callback."""
    if report.loss is not None and report.loss < 0.5:
        report.stop()


def right() -> None:
    """Call every function as it is meant."""
    trained = swlora.train(
        model="builtin",
        dataset=Path("rows.csv"),
        layers=[1, 2],
        rank=8,
        targets=["q_proj"],
        learning_rate=1e-3,
        callbacks=[stop_early, lambda report: report.step],
        progress=False,
    )
    assert_type(trained, Trained)
    swlora.train(output="runs/mine", resume=True, epochs=3)
    swlora.evaluate("runs/mine", model="builtin", split="test", num_beams=4)
    swlora.identify(model="builtin", windows=2, figure="spikes.png")
    loaded = swlora.load("runs/mine", dtype="float32")
    assert_type(loaded, LoadedModel)
    assert_type(swlora.generate("good day", model=loaded), Generated)
    assert_type(swlora.generate(["a", "b"], model="builtin", temperature=0.7), list[Generated])
    assert_type(swlora.evaluate(model=loaded, dataset="rows.csv"), Evaluated)
    swlora.merge("runs/mine", "merged", dtype="bfloat16", model=Path("base"))
    assert_type(swlora.export("mine.gguf", model="merged", type="q8_0"), Exported)
    swlora.compare("study.yaml", only=["lora"])


def wrong() -> None:
    """Make mistakes of every kind."""
    swlora.train(rnak=8)  # type: ignore[call-arg]
    swlora.train(rank="eight")  # type: ignore[arg-type]
    swlora.train(method="lroa")  # type: ignore[arg-type]
    swlora.train(num_beams=4)  # type: ignore[call-arg]
    swlora.train(callbacks=3)  # type: ignore[arg-type]
    swlora.evaluate(rank=8)  # type: ignore[call-arg]
    swlora.evaluate(split="train")  # type: ignore[arg-type]
    swlora.evaluate(model=3)  # type: ignore[arg-type]
    swlora.identify(learning_rate=1e-3)  # type: ignore[call-arg]
    swlora.load(max_new_tokens=5)  # type: ignore[call-arg]
    swlora.generate("good day", epochs=3)  # type: ignore[call-overload]
    swlora.merge("runs/mine")  # type: ignore[call-arg]
    swlora.export("mine.gguf", type="int8")  # type: ignore[arg-type]
