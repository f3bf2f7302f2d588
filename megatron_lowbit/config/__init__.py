"""Configuration: one frozen model per command, read from a YAML file and dotted overrides.

    load_config(EvaluateConfig, "run.yaml", ["comm.bits=4", "tp=2"])

sections.py and stages.py hold the keys with their descriptions, loading.py reads them, errors.py words what is wrong.
"""

from megatron_lowbit.config.errors import NOTICED, LowBitError, one_line, shown, unwritten
from megatron_lowbit.config.fields import Key, Section, defaults, list_sections
from megatron_lowbit.config.loading import load_config, old_name
from megatron_lowbit.config.sections import (
    DRIFT_THRESHOLD,
    LOCAL_TASK,
    PLAN_KEYS,
    CalibrationConfig,
    CommConfig,
    CommMode,
    CorrectionConfig,
    EngineName,
    EvaluationConfig,
    RatesConfig,
    ReassemblyConfig,
    RotationConfig,
    SchemeName,
    WeightsConfig,
    check_mode,
)
from megatron_lowbit.config.stages import (
    CalibrateConfig,
    ConvertConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ParityConfig,
    QuantizeConfig,
    ServeConfig,
    StageConfig,
)

__all__ = [
    "DRIFT_THRESHOLD",
    "LOCAL_TASK",
    "NOTICED",
    "PLAN_KEYS",
    "CalibrateConfig",
    "CalibrationConfig",
    "CommConfig",
    "CommMode",
    "ConvertConfig",
    "CorrectionConfig",
    "DemoConfig",
    "EngineName",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerateConfig",
    "Key",
    "LowBitError",
    "ParityConfig",
    "QuantizeConfig",
    "RatesConfig",
    "ReassemblyConfig",
    "RotationConfig",
    "SchemeName",
    "Section",
    "ServeConfig",
    "StageConfig",
    "WeightsConfig",
    "check_mode",
    "defaults",
    "list_sections",
    "load_config",
    "old_name",
    "one_line",
    "shown",
    "unwritten",
]
