"""megatron-lowbit report: one HTML page of a run, or of several side by side, made from what their folders hold."""

from __future__ import annotations

from pathlib import Path

from megatron_lowbit.config import LowBitError
from megatron_lowbit.launch import STAGES
from megatron_lowbit.launch.arguments import Parser, fail
from megatron_lowbit.runtime.say import say

PAGE = "report.html"
COMPARISON = "comparison.html"


def main(argv: list[str]) -> int:
    """Run `megatron-lowbit report ARGV`; returns the exit code."""
    parser = Parser(prog="megatron-lowbit report", description=STAGES["report"], config=None)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a command that has ended")
    page = f"the page; by default {PAGE} in a single RUN, of several {COMPARISON} in the working folder"
    parser.add_argument("--output", metavar="FILE", help=page)
    try:
        args = parser.parse_intermixed_args(argv)
        output = Path(args.output or (Path(args.runs[0]) / PAGE if len(args.runs) == 1 else COMPARISON))
        from megatron_lowbit.launch.page.build import write_page  # and with it torch

        size = write_page(args.runs, output)
    except LowBitError as error:
        return fail(str(error))
    say(f"wrote {output}, {size / 1e3:,.0f} kB: open it in a browser")
    return 0
