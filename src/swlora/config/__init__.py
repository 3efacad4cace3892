"""What a run is asked to do: one tree of strict specifications, one default per value.

A section `adapter:` of the YAML file is `config/adapter.py`, and so on. Unknown keys and impossible
values are refused, all of them in one message. The command line overrides single values by their
dotted names (`adapter.rank`). Nothing here imports torch, touches the disk beyond the YAML file, or
probes the machine.
"""

from swlora.config.adapter import (
    LORA_PLUS_RATIO,
    METHOD_NAMES,
    METHOD_SETTINGS,
    OPTIONAL_SETTINGS,
    AdapterSpec,
    MethodName,
    settings_of,
)
from swlora.config.data import DEFAULT_DATASET, SAMPLE_DATASET, DataSpec
from swlora.config.decode import DecodeSpec
from swlora.config.identify import IdentifySpec
from swlora.config.model import BUILTIN_MODEL, DEFAULT_MODEL, ModelSpec
from swlora.config.rates import DEFAULT_RATE, default_rate, method_rate
from swlora.config.run import (
    TRIED_AS_THEMSELVES,
    RunSpec,
    SharedSections,
    load_recorded_spec,
    load_spec,
    rate_trial_problem,
    sharding_problem,
)
from swlora.config.serve import ServeSpec
from swlora.config.train import (
    DEFAULT_BATCH_SIZE,
    EARLIER_BATCH_SIZE,
    FEW_ROWS,
    FEW_STEPS,
    PASSES,
    TrainSpec,
)
from swlora.config.yaml_file import dump_yaml

__all__ = [
    "BUILTIN_MODEL",
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_DATASET",
    "DEFAULT_MODEL",
    "DEFAULT_RATE",
    "EARLIER_BATCH_SIZE",
    "FEW_ROWS",
    "FEW_STEPS",
    "LORA_PLUS_RATIO",
    "METHOD_NAMES",
    "METHOD_SETTINGS",
    "OPTIONAL_SETTINGS",
    "PASSES",
    "SAMPLE_DATASET",
    "TRIED_AS_THEMSELVES",
    "AdapterSpec",
    "DataSpec",
    "DecodeSpec",
    "IdentifySpec",
    "MethodName",
    "ModelSpec",
    "RunSpec",
    "ServeSpec",
    "SharedSections",
    "TrainSpec",
    "default_rate",
    "dump_yaml",
    "load_recorded_spec",
    "load_spec",
    "method_rate",
    "rate_trial_problem",
    "settings_of",
    "sharding_problem",
]
