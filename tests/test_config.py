"""Configuration: where a value comes from, and one line for everything that can be wrong with it."""

import pytest

from megatron_lowbit.config import (
    CalibrateConfig,
    CommConfig,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    LowBitError,
    QuantizeConfig,
    defaults,
    load_config,
    one_line,
)
from megatron_lowbit.launch.benchmark_config import BenchmarkConfig
from megatron_lowbit.quantizer import Scheme

STAGES = (BenchmarkConfig, CalibrateConfig, DemoConfig, EvaluateConfig, GenerateConfig, QuantizeConfig)


def refused(*overrides: str, stage=EvaluateConfig, file: str | None = None) -> str:
    """The message that the overrides (or the file) end in: one line."""
    with pytest.raises(LowBitError) as raised:
        load_config(stage, file, list(overrides))
    message = str(raised.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_valid(stage):
    config = load_config(stage, None, [])
    assert config == stage()
    assert stage.model_validate(config.model_dump()) == config


def test_overrides_reach_nested_keys():
    overrides = ["comm.bits=6", "tp=2", "evaluation.samples=3", "weights.symmetric=true"]
    config = load_config(EvaluateConfig, None, overrides)
    assert (config.comm.bits, config.tp, config.evaluation.samples, config.weights.symmetric) == (6, 2, 3, True)
    assert config.calibration.samples == 128  # untouched, in a section of the same shape


def test_overrides_beat_the_file_and_each_other(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("tp: 4\ncomm:\n  bits: 6\n  bf16_fraction: 0.25\nseed: 7\n")
    config = load_config(EvaluateConfig, str(file), ["comm.bits=3", "tp=2", "comm.bits=5"])
    assert (config.comm.bits, config.tp) == (5, 2)  # the last one
    assert (config.comm.bf16_fraction, config.seed) == (0.25, 7)  # the file's
    assert config.comm.selection == "top"  # the default


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(EvaluateConfig, str(tmp_path / "empty.yaml"), []) == EvaluateConfig()


def test_a_config_is_frozen():
    config = load_config(EvaluateConfig, None, [])
    with pytest.raises(ValueError, match="frozen"):
        config.tp = 2
    with pytest.raises(ValueError, match="frozen"):
        config.comm.bits = 2


def test_defaults_lists_every_value_under_its_dotted_key():
    config = load_config(CalibrateConfig, None, ["comm.bits=6"])
    expected = {}
    for key, value in config.model_dump().items():
        expected |= {f"{key}.{name}": leaf for name, leaf in value.items()} if isinstance(value, dict) else {key: value}
    assert defaults(config) == expected
    assert expected["comm.bits"] == 6 and expected["comm.tp_sizes"] == (2, 4, 8)


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("comm.bitz=4", "comm.bitz", "comm.bits"),
        ("com.bits=4", "com", "comm"),
        ("bits=4", "bits", "comm.bits"),  # the right name in the wrong place
        ("Model=x", "Model", "model"),
        ("output-dir=x", "output-dir", "output_dir"),
    ],
)
def test_unknown_key_names_the_nearest(override, key, nearest):
    assert refused(override) == f"unknown config key {key!r}; did you mean {nearest!r}?"


def test_unknown_key_like_no_other_lists_all():
    message = refused("zzzqqq=1")
    assert message.startswith("unknown config key 'zzzqqq'; valid keys: model, ")
    for key in ("tp", "comm.bits", "evaluation.kl_tokens", "weights.group_size"):
        assert f" {key}," in message + ","


def test_a_key_of_another_stage_is_unknown():
    assert "unknown config key 'evaluation'" in refused("evaluation.samples=3", stage=CalibrateConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.scheme=W4A9", "weights.scheme='W4A9' is not one of none, W4A16, W4A8, W4A4, W6A6, W8A8"),
        ("comm.mode=oneshot", "did you mean 'one_shot'?"),
        (
            "engine=hugging",
            "engine='hugging' is not one of huggingface, deepspeed, megatron; did you mean 'huggingface'?",
        ),
        ("dtype=bf16", "dtype='bf16' is not one of auto, float32, bfloat16; did you mean"),
        ("comm.selection=tops", "did you mean 'top'?"),
        ("weights.method=3", "weights.method=3 is not one of rtn, qllm"),
    ],
)
def test_literal_names_the_nearest(override, message):
    assert message in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("comm.bits=1", "comm.bits=1: input should be greater than or equal to 2"),
        ("comm.bits=9", "comm.bits=9: input should be less than or equal to 8"),
        ("comm.bf16_fraction=-0.1", "comm.bf16_fraction=-0.1: input should be greater than or equal to 0"),
        ("comm.bf16_fraction=1.5", "comm.bf16_fraction=1.5: input should be less than or equal to 1"),
        ("comm.tp_sizes=[2, 1]", "a tensor-parallel size is at least 2"),
        ("tp=0", "tp=0: input should be greater than or equal to 1"),
        ("virtual_tp=-2", "virtual_tp=-2: "),
        ("calibration.samples=0", "calibration.samples=0: "),
        ("calibration.sequence_length=1", "calibration.sequence_length=1: input should be greater than or equal to 2"),
        ("calibration.ema_gamma=0", "calibration.ema_gamma=0: input should be greater than 0"),
        ("calibration.ema_gamma=1.01", "calibration.ema_gamma=1.01: input should be less than or equal to 1"),
        ("evaluation.kl_tokens=-1", "evaluation.kl_tokens=-1: "),
        ("weights.group_size=0", "weights.group_size=0: "),
        ("weights.shard_groups=0", "weights.shard_groups=0: "),
        ("comm.bf16_fraction=nan", "comm.bf16_fraction="),
    ],
)
def test_out_of_range(override, message):
    assert message in refused(override)


@pytest.mark.parametrize("override", ["comm.bits=2", "comm.bits=8", "comm.bf16_fraction=0", "comm.bf16_fraction=1"])
def test_the_ends_of_a_range_are_valid(override):
    load_config(EvaluateConfig, None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tp=two", "tp='two': input should be a valid integer"),
        ("tp=2.5", "tp=2.5: input should be a valid integer"),
        ("comm.tp_sizes=4", "comm.tp_sizes=4: "),
        ("comm.tp_sizes=[2, x]", "comm.tp_sizes.1='x': input should be a valid integer"),
        ("weights.symmetric=perhaps", "weights.symmetric='perhaps': input should be a valid boolean"),
        ("comm=3", "comm=3: "),
        ("comm=null", "comm=None: "),
        ("tp=[1", "tp='[1': "),  # no YAML
    ],
)
def test_wrong_type(override, message):
    assert message in refused(override)


@pytest.mark.parametrize("override", ["tp", "", "=4", "--tp"])
def test_an_override_without_key_or_value(override):
    assert refused(override) == f"override {override!r} is not of the form key.path=value"


def test_an_override_below_a_value():
    assert refused("comm.bits=4", "comm.bits.low=4").endswith("'bits' is a value, not a section")
    assert refused("comm=4", "comm.bits=3").endswith("'comm' is a value, not a section")


@pytest.mark.parametrize("override", ["comm.bits.low.high=4", "model.a.b=4"])
def test_an_override_far_below_a_value(override):
    refused(override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"comm: [1", "cannot read config file"),
        (b"a: b: c", "cannot read config file"),
        (b"\xff\xfe\x00", "cannot read config file"),
        (b"- tp\n- 2\n", "must hold keys and values, not list"),
        (b"just text", "must hold keys and values, not str"),
        (b"3", "must hold keys and values, not int"),
        (b"comm:\n  bitz: 4\n", "unknown config key 'comm.bitz'; did you mean 'comm.bits'?"),
        (b"comm:\n  bits: 9\n", "comm.bits=9: input should be less than or equal to 8"),
        (b"1: 2", "keys should be strings"),
    ],
)
def test_bad_file(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert message in refused(file=str(file))


def test_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        message = refused(file=str(path))
        assert message.startswith(f"cannot read config file {str(path)!r}: ")


@pytest.mark.parametrize("text", ["123", "007", "1e3", "true", "[oops", "a: b", "2024-01-01", "key=value", "- x", "{"])
def test_text_stays_what_was_typed(text):
    config = load_config(GenerateConfig, None, [f"prompt={text}", f"model={text}", f"calibration.data={text}"])
    assert config.prompt == config.model == config.calibration.data == text


@pytest.mark.parametrize("text", ["null", "none", ""])
def test_optional_text_can_be_unset(text):
    assert load_config(DemoConfig, None, [f"model={text}", f"calibration.data={text}"]).model is None


@pytest.mark.parametrize("text", ["null", "none", ""])
def test_none_switches_numbers_and_choices_off_too(text):
    config = load_config(EvaluateConfig, None, [f"comm.drift_threshold={text}", f"weights.method={text}"])
    assert config.comm.drift_threshold is None and config.weights.method is None
    assert load_config(EvaluateConfig, None, ["weights.scheme=none"]).weights.scheme == "none", "a scheme's name"


def test_null_unsets_other_values():
    config = load_config(QuantizeConfig, None, ["weights.group_size=null", "comm.mode=null"])
    assert config.weights.group_size is None and config.comm.mode is None


def test_an_empty_prompt():
    assert refused("prompt=", stage=GenerateConfig).startswith("prompt=")


@pytest.mark.parametrize("value", ["off", "offline", "online"])
def test_every_value_of_wandb_can_be_given(tmp_path, value):
    assert load_config(EvaluateConfig, None, [f"wandb={value}"]).wandb == value
    (tmp_path / "run.yaml").write_text(f"wandb: {value}\n")
    assert load_config(EvaluateConfig, str(tmp_path / "run.yaml"), []).wandb == value


def test_one_line():
    assert one_line(ValueError("\n  first \nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("name", "weight_bits", "act_bits"),
    [("none", 16, 16), ("W4A16", 4, 16), ("W4A8", 4, 8), ("W2A2", 2, 2), ("W8A8", 8, 8), ("W16A8", 16, 8)],
)
def test_scheme(name, weight_bits, act_bits):
    assert Scheme.parse(name) == Scheme(weight_bits, act_bits)


@pytest.mark.parametrize("name", ["", "W4", "4A8", "A8W4", "w4a8", "W4A8 ", "WxA8", "W4A", "W-4A8", "W4.0A8", "None"])
def test_scheme_of_another_form(name):
    with pytest.raises(LowBitError, match="is not of the form W4A8"):
        Scheme.parse(name)


@pytest.mark.parametrize(("name", "bits"), [("W1A8", 1), ("W9A8", 9), ("W4A9", 9), ("W4A32", 32), ("W0A8", 0)])
def test_scheme_with_other_bits(name, bits):
    with pytest.raises(LowBitError, match=rf"num_bits={bits} is not in 2\.\.8"):
        Scheme.parse(name)


def test_a_preset_gives_way_to_what_is_given(tmp_path):
    """preset=paper is static ranges and uniform bits, from a file, an override or code; given keys win in any order."""
    best = load_config(EvaluateConfig, None, []).comm
    assert (best.preset, best.scale, best.allocation) == ("best", "rank1", "adaptive")
    file = tmp_path / "paper.yaml"
    file.write_text("comm:\n  preset: paper\n")
    for paper in (
        load_config(EvaluateConfig, str(file), []).comm,
        load_config(EvaluateConfig, None, ["comm.preset=paper"]).comm,
        load_config(EvaluateConfig, None, ["comm.preset='paper'"]).comm,
        load_config(EvaluateConfig, None, ["comm.preset=best", "comm.preset=paper"]).comm,
        CommConfig(preset="paper"),
    ):
        assert (paper.scale, paper.allocation, paper.bits, paper.bf16_fraction) == ("static", "uniform", 4, 1 / 64)
    for overrides in (["comm.scale=rank1", "comm.preset=paper"], ["comm.preset=paper", "comm.scale=rank1"]):
        mixed = load_config(EvaluateConfig, None, overrides).comm
        assert (mixed.scale, mixed.allocation) == ("rank1", "uniform")
    assert load_config(EvaluateConfig, str(file), ["comm.preset=best"]).comm == best, "the last one counts"
    assert load_config(EvaluateConfig, str(file), ["comm.allocation=adaptive"]).comm.allocation == "adaptive"
    with pytest.raises(LowBitError, match="selection=random chooses bf16 features"):
        load_config(EvaluateConfig, None, ["comm.selection=random"])


@pytest.mark.parametrize("others", [[], ["comm.preset=paper", "comm.clipping=histogram"]])
def test_symmetric_ranges_are_the_papers(others):
    with pytest.raises(LowBitError, match=r"symmetric=true is of ranges as they were seen; set comm\.preset=paper"):
        load_config(EvaluateConfig, None, [*others, "comm.symmetric=true"])
    assert load_config(EvaluateConfig, None, ["comm.preset=paper", "comm.symmetric=true"]).comm.symmetric
