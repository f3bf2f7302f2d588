"""Every key has a description, which --help and docs/configuration.md print."""

from pathlib import Path

import pytest

from megatron_lowbit import launch
from megatron_lowbit.config import (
    defaults,
    list_sections,
)
from megatron_lowbit.launch import arguments
from megatron_lowbit.launch.bench.config import (
    BenchmarkCollectivesConfig,
    BenchmarkGpuConfig,
    BenchmarkKernelsConfig,
    BenchmarkLinearConfig,
    BenchmarkModelConfig,
)
from megatron_lowbit.launch.slurm.config import SlurmConfig
from megatron_lowbit.launch.tools import configuration

BENCHMARKS = [
    BenchmarkCollectivesConfig,
    BenchmarkKernelsConfig,
    BenchmarkLinearConfig,
    BenchmarkModelConfig,
    BenchmarkGpuConfig,
]
CONFIGS = [*arguments.CONFIGS.values(), *BENCHMARKS, SlurmConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_key_has_a_description(config):
    """Also one whose default alone a command changes; and no section is without a title."""
    sections = list(list_sections(config()))
    for section in sections:
        assert section.title or section.prefix == "", section.prefix
        for key in section.keys:
            assert len(key.description) > 4, key.name
    if "NAME" not in str(sections):  # SlurmConfig's stages have names of the user's choice
        assert {key.name: key.default for section in sections for key in section.keys} == defaults(config())


@pytest.mark.parametrize("command", [*arguments.CONFIGS, *(f"benchmark {kind}" for kind in launch.BENCHMARKS), "slurm"])
def test_help_explains_every_key(command, capsys, monkeypatch):
    """--help prints key, default and description of all that a command takes, on 80 columns whatever the window."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        launch.main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, out.splitlines())) <= 80
    assert "  output_dir=runs/" in out and "folder of " in out
    if command in ("evaluate", "quantize"):
        expected = "  comm.bits=4\n      bits of a feature that does not travel in bf16\n"
        assert expected in out and "\n\ncomm: Low-bit communication" in out
    if command in ("benchmark kernels", "benchmark linear", "benchmark model", "benchmark gpu"):
        assert "  model=" not in out, "a key that the command refuses"


def test_the_page_of_all_keys_is_what_the_code_says():
    """docs/configuration.md is generated: run the command in its first lines after a change of a key."""
    file = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert file.read_text() == configuration.page()
    for command in CONFIGS:
        for key in defaults(command()):
            if command not in BENCHMARKS:  # which refuse some
                assert f"| `{key}` |" in configuration.page()
