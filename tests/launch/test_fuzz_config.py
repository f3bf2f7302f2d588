"""Random configs and command lines end in a config, or in one line and exit code 2; how they are made: config_fuzz.py.

Run without torch in the way: `python tests/config_fuzz.py FIRST COUNT` says more about a share of them.
"""

import config_fuzz
import pytest

from megatron_lowbit.config import LowBitError


@pytest.mark.parametrize("first", range(0, 500, 125))
def test_a_share(first):
    found, examples = config_fuzz.count(first, 125)
    assert set(found) == {"config", "refused"}, examples


@pytest.mark.slow
@pytest.mark.parametrize("first", range(500, 20_500, 1000))
def test_twenty_thousand(first):
    found, examples = config_fuzz.count(first, 1000)
    assert set(found) == {"config", "refused"}, examples


def test_the_fuzzer_sees_what_is_wrong():
    def breaks(stage, argv):
        raise ValueError("as a constructor would")

    def talks(stage, argv):
        print("two\nlines", file=__import__("sys").stderr)
        return 2

    assert config_fuzz.outcome("evaluate", [], breaks).startswith("traceback: ValueError in test_fuzz_config.py:")
    assert config_fuzz.outcome("evaluate", [], talks).startswith("exit code 2 and")
    with pytest.raises(LowBitError):
        config_fuzz.load_config(config_fuzz.SlurmConfig, None, ["nodes=x"])
