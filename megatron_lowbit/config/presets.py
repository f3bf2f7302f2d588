"""Presets: one word for the values of several keys, which give way to keys that are given.

comm.preset=paper       arXiv 2411.07942, where it differs from our defaults
weights.preset=qllm     arXiv 2310.08041: its steps alone, trained as configs/llama*.yaml say
weights.preset=best     what measures best (docs/qllm.md, "What each step gains")
evaluation.data=gptq:   the windows that perplexities of papers are taken of (io/gptq_text.py)
experiment=qllm         weights.preset=qllm, which its rows of that name have
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

Sections = Mapping[str, Mapping[str, Any]]  # {section: {key: value}}

# {section: {preset: the keys it stands for, also those of other sections}}
PRESETS: Mapping[str, Mapping[str, Sections]] = {
    # More windows than any of these texts has.
    "evaluation": {"gptq": {"evaluation": {"samples": 4096, "sequence_length": 2048}}},
    "comm": {"paper": {"comm": {"scale": "static", "allocation": "uniform"}}},
    "weights": {
        "qllm": {
            "weights": {"method": "qllm", "rotation": "none", "clipping": "none", "rounding": "nearest"},
            "reassembly": {"mode": "adaptive"},
            "correction": {
                **{"mode": "merged", "rank": 4, "blocks_per_group": 4, "batch_size": 1},
                **{"epochs": 10, "learning_rate": 5e-4, "weight_decay": 0.0, "holdout": 0.0},
            },
        },
        "best": {
            "weights": {"method": "qllm", "rotation": "learned", "clipping": "mse", "rounding": "gptq"},
            "reassembly": {"mode": "none"},
            "correction": {"mode": "none"},
        },
    },
}


def preset_of(section: str, values: Any) -> Sections:
    """Return the keys of the preset that `values`, a section's values or model, name; none for another word."""
    key = preset_key(section)
    name = values.get(key) if isinstance(values, Mapping) else getattr(values, key, None)
    return named_preset(section, name) if isinstance(name, str) else {}


def preset_key(section: str) -> str:
    """Return the key of a section that names a preset."""
    return "data" if section == "evaluation" else "preset"


def named_preset(section: str, name: str) -> Sections:
    """Return the keys of a preset by the value of the key that names it: gptq of gptq:wikitext2; none for others."""
    return PRESETS[section].get(name.partition(":")[0], {})


def with_preset(section: str, values: Any) -> Any:
    """Return a section's values with those of its preset where none are given; what is no dict as it is."""
    return {**preset_of(section, values).get(section, {}), **values} if isinstance(values, dict) else values


def with_presets(values: Any) -> Any:
    """Return a command's values with those that the preset of its weights has for other sections, which may be dicts or
    models."""
    if not isinstance(values, dict):
        return values
    filled = dict(values)
    if values.get("experiment") == "qllm" and isinstance(values.get("weights", {}), dict):
        filled["weights"] = {"preset": "qllm", **values.get("weights", {})}
    for section, keys in preset_of("weights", filled.get("weights")).items():
        given = values.get(section, {})
        given = given.model_dump(exclude_unset=True) if isinstance(given, BaseModel) else given
        if section != "weights" and isinstance(given, dict):  # that one fills itself
            filled[section] = {**keys, **given}
    return filled
