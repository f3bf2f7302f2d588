"""Prints docs/configuration.md, the reference of all configuration keys, from the descriptions in the configs.

python -m megatron_lowbit.launch.tools.configuration > docs/configuration.md
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from megatron_lowbit.config import Key, StageConfig, defaults, list_sections
from megatron_lowbit.launch import STAGES
from megatron_lowbit.launch.arguments import CONFIGS
from megatron_lowbit.launch.bench.arguments import NOT_HERE
from megatron_lowbit.launch.bench.config import (
    UNUSED,
    BenchmarkCollectivesConfig,
    BenchmarkGpuConfig,
    BenchmarkKernelsConfig,
    BenchmarkLinearConfig,
    BenchmarkModelConfig,
)
from megatron_lowbit.launch.help import as_typed, describe
from megatron_lowbit.launch.slurm.config import SlurmConfig

SECTIONS = {  # {name: model} of all that a command takes
    name: field.annotation
    for config in CONFIGS.values()
    for name, field in config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
INTRODUCTION = """# Configuration

This page is generated from the descriptions in the code, which `megatron-lowbit COMMAND --help` prints too:
`python -m megatron_lowbit.launch.tools.configuration > docs/configuration.md`.

A command takes its keys from a YAML file and from the command line; what stands later wins:

1. the default, as in the tables below;
2. `comm.preset` and `weights.preset`, which stand for several keys;
3. `--config FILE`: keys as YAML, those of a section indented below its name;
4. the file's section `schemes`: what stands there below the chosen `weights.scheme` (configs/llama2_7b.yaml has an
   example);
5. `key=value` on the command line, from left to right; a key of a section is written `comm.bits=4`;
6. the options `--model`, `--output-dir`, `--engine` and `--wandb`.

`none`, `null` or nothing after `=` unset a key whose default may be none. A key or a value that does not exist is an
error: one line that names it and the nearest that does, and exit code 2.

Old spellings that still work, with a notice: `comm.scale=rank1` is `per_token`; `--config MODEL_w4a8.yaml` is
`MODEL.yaml` with `weights.scheme=W4A8`.
"""


def page() -> str:
    """Return the page as Markdown."""
    (shared,) = list_sections(StageConfig())
    parts = [INTRODUCTION, "## Keys of every command\n", _table(shared.keys)]
    for name, config in SECTIONS.items():
        (section,) = list_sections(config(), f"{name}.")
        takers = ", ".join(f"`{stage}`" for stage, c in CONFIGS.items() if name in c.model_fields)
        parts += [f"## {name}\n", f"{section.title} Taken by {takers}.\n", _table(section.keys)]
    for stage, config in CONFIGS.items():
        parts += [f"## {stage}\n", *_command(stage, config)]
    for kind, config, unused in (
        ("collectives", BenchmarkCollectivesConfig, NOT_HERE),
        ("kernels", BenchmarkKernelsConfig, UNUSED),
        ("linear", BenchmarkLinearConfig, UNUSED),
        ("model", BenchmarkModelConfig, UNUSED),
        ("gpu", BenchmarkGpuConfig, UNUSED),
    ):
        parts += [f"## benchmark {kind}\n", f"{' '.join((config.__doc__ or '').split())}\n"]
        keys = [key for section in list_sections(config()) for key in section.keys if key.name not in unused]
        parts.append(_table(keys))
    parts += ["## slurm\n", f"{_sentence(STAGES['slurm'])}\n"]
    for section in list_sections(SlurmConfig()):
        parts += [f"{section.title}\n", _table(section.keys)]
    return "\n".join(parts)


def _command(stage: str, config: type[StageConfig]) -> Iterable[str]:
    """Return the sections that a command takes, its own keys, and what it sets otherwise than the tables above."""
    own, *sections = list_sections(config())
    yield f"{_sentence(STAGES[stage])}\n"
    if sections:
        yield f"Sections: {', '.join(f'`{section.prefix[:-1]}`' for section in sections)}.\n"
    usual = defaults(StageConfig())
    for section in sections:
        usual |= defaults(SECTIONS[section.prefix[:-1]](), section.prefix)
    keys = [key for section in (own, *sections) for key in section.keys]
    other = [key for key in keys if key.name in usual and usual[key.name] != key.default]
    if other:
        yield f"Other defaults: {', '.join(f'`{key.name}={as_typed(key.default)}`' for key in other)}.\n"
    if new := [key for key in own.keys if key.name not in usual]:
        yield _table(new)


def _table(keys: Iterable[Key]) -> str:
    """Markdown, in which | would end a cell and <name> would be taken for HTML."""
    rows = ["| Key | Default | Meaning |", "| --- | --- | --- |"]
    for key in keys:
        meaning = describe(key).replace("|", r"\|").replace("<", r"\<")
        rows.append(f"| `{key.name}` | `{as_typed(key.default)}` | {meaning} |")
    return "\n".join(rows) + "\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


if __name__ == "__main__":
    print(page(), end="")
