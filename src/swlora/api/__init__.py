"""swlora in Python: the functions behind `swlora.train` and its like, one for each command.

    jobs.py       identify, train, evaluate, compare
    models.py     load, generate, merge, export
    settings.py   which settings each takes, as typed keyword arguments (made: `make settings`)
    call.py       from keyword arguments to a configuration and a job
    at_hand.py    a model that is loaded already in the place of one that is named
    bars.py       progress in a notebook

Settings are keyword arguments with the names of the command line's flags (`batch_size` for
--batch-size), and mean the same. Without `output` there is no run folder, and nothing is written
but a `figure` that was asked for and what lies in the cache folder. Nothing here imports torch
before a function is called.
"""

from swlora.api.jobs import compare, evaluate, identify, train
from swlora.api.models import export, generate, load, merge

__all__ = ["compare", "evaluate", "export", "generate", "identify", "load", "merge", "train"]
