"""One YAML per model: its section `schemes`, and the files of a scheme that it has replaced."""

import pytest
from config_errors import refused

from megatron_lowbit.config import (
    CalibrateConfig,
    QuantizeConfig,
    errors,
    load_config,
)

SCHEMES = """
weights: {scheme: W4A4}
correction: {epochs: 10}
output_dir: runs/any
schemes:
  W4A4: {output_dir: runs/a, correction: {learning_rate: 0.25}}
  W4A8: {output_dir: 008, comm: {preset: paper}}
"""


def test_a_scheme_brings_its_own_keys(tmp_path):
    """The section `schemes` of a file: keys of the chosen scheme beat the file's, and overrides beat both."""
    file = tmp_path / "model.yaml"
    file.write_text(SCHEMES)

    def load(*overrides: str) -> QuantizeConfig:
        return load_config(QuantizeConfig, str(file), list(overrides))

    assert (load().output_dir, load().correction.learning_rate, load().correction.epochs) == ("runs/a", 0.25, 10)
    w4a8 = load("weights.scheme=W6A6", "weights.scheme=W4A8")
    assert (w4a8.output_dir, w4a8.correction.learning_rate, w4a8.correction.epochs) == ("008", 5e-3, 10)
    assert w4a8.comm.scale == "static", "a preset counts there too"
    assert load("weights={scheme: W4A8}").output_dir == "008"
    assert load("weights.scheme=W8A8").output_dir == "runs/any", "a scheme that is not listed brings nothing"
    assert load("output_dir=mine").output_dir == load("output_dir=mine", "weights.scheme=W4A8").output_dir == "mine"
    assert refused(stage=CalibrateConfig, file=str(file)).startswith("unknown config key")


@pytest.mark.parametrize(
    ("schemes", "said"),
    [
        ("[W4A4]", "schemes=['W4A4']: give a section of keys for each scheme"),
        ("{W4A9: {tp: 2}}", "schemes: 'W4A9' is not one of none, W4A16, W4A8"),
        ("{w4a8: {tp: 2}}", "schemes: 'w4a8' is not one of none, W4A16, W4A8"),
        ("{W4A8: 3}", "schemes.W4A8=3: give keys and values"),
        ("{W4A8: {tpp: 3}}", "unknown config key 'tpp'"),
    ],
)
def test_schemes_that_are_none(schemes, said, tmp_path):
    (tmp_path / "model.yaml").write_text(f"schemes: {schemes}\n")
    assert said in refused(stage=QuantizeConfig, file=str(tmp_path / "model.yaml"))


def test_the_file_of_a_scheme_is_that_of_its_model(tmp_path, caplog):
    """MODEL_w4a8.yaml was a file once: MODEL.yaml is read with that scheme, and a line says so; a real file wins."""
    errors.notice.cache_clear()
    (tmp_path / "model.yaml").write_text(SCHEMES)
    old = str(tmp_path / "model_w4a8.yaml")
    for _ in range(2):  # arguments are parsed twice
        assert load_config(QuantizeConfig, old, []).output_dir == "008"
    assert [record.message for record in caplog.records] == [
        f"{old} is not there; {tmp_path / 'model.yaml'} is read with weights.scheme=W4A8"
    ]
    assert load_config(QuantizeConfig, old, ["weights.scheme=W4A4"]).output_dir == "runs/a"
    (tmp_path / "model_w4a8.yaml").write_text("output_dir: runs/real\n")
    assert load_config(QuantizeConfig, old, []).output_dir == "runs/real"
    for missing in ("model_w3a3.yaml", "model_.yaml", "other_w4a8.yaml", "model_w4a8.txt"):
        assert "cannot read config file" in refused(stage=QuantizeConfig, file=str(tmp_path / missing))
