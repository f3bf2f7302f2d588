"""A Weights & Biases run that can neither stop nor slow the job.

One daemon thread owns everything of wandb: the job only puts records into its queue. Starting, uploading and ending are
bounded; whatever goes wrong is one line on standard error. A server that does not answer, or a missing key, turns
wandb=online into offline, and an offline run ends with the `wandb sync` line that uploads it.

One logical run may be several processes, of which some were killed. wandb writes its file every 15 seconds, so a killed
process leaves fewer records there than in metrics.jsonl. The next one first sends what is missing: it reads the last
step from the files (or, online, from the server), and so the merged history has neither gaps nor overlaps.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import ssl
import struct
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megatron_lowbit.config import one_line

ANSWER_SECONDS = 3  # for the server's first sign of life; wandb itself would ask again until START_SECONDS are over
START_SECONDS = 8  # for wandb to start, online or offline
FINISH_SECONDS = 5  # for what is not uploaded yet; it is in wandb's file, too
CLOSE_SECONDS = ANSWER_SECONDS + 2 * START_SECONDS + FINISH_SECONDS  # the most that the end of a job waits

_HEADER, _FRAGMENT, _BLOCK = 7, struct.Struct("<IHB"), 32 * 1024  # of a .wandb file, which is in LevelDB's log format


class WandbRun:
    """The part of logical run `run_id` that this process logs. records: the records that metrics.jsonl had before."""

    def __init__(
        self,
        mode: str,
        folder: Path,
        run_id: str,
        stage: str,
        config: dict[str, Any],
        records: Sequence[dict[str, Any]],
    ):
        self.mode, self.folder, self.run_id, self.stage = mode, folder.absolute(), run_id, stage
        self._run: Any = None
        self._step: int | None = None  # of the last record
        self._warned = False  # that something went wrong
        self._queue: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # without a network that alone takes up to 20 s
        self._thread = threading.Thread(target=self._work, args=(config, records), daemon=True, name="wandb")
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl: figures, or a table."""
        self._queue.put(partial(self._log, record))

    def summary(self, **values: Any) -> None:
        self._queue.put(lambda: self._run.summary.update(values))

    def artifact(self, name: str, kind: str, files: Sequence[Path], metadata: dict[str, Any]) -> None:
        """Log references to files, which stay where they are. Only JSON is read for its checksum; it holds the
        others'."""
        self._queue.put(partial(self._artifact, name, kind, [file.absolute() for file in files], metadata))

    def page(self, file: Path) -> None:
        """Log an HTML file as a panel of the run. It has no step of its own: it goes with the last record's."""
        self._queue.put(partial(self._page, file.absolute()))

    def close(self, exit_code: int) -> None:
        """End the run, waiting no more than CLOSE_SECONDS."""
        self._queue.put(partial(self._finish, exit_code))
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _say(f"gave up after {CLOSE_SECONDS} s; {self._sync_line()}")

    def _work(self, config: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
        with self._guarded("did not start"):
            self._start(config)
        if self._run is None:
            return
        with self._guarded("lacks earlier records"):
            last = self._last_step()
            for record in records:
                if record["step"] > last:
                    self._log(record)
        for action in iter(self._queue.get, None):
            with self._guarded("lacks a record"):
                action()

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Surround calls into wandb: whatever they raise is reported once."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                _say(f"{what}: {one_line(error)}; all records are in metrics.jsonl")
            self._warned = True

    def _start(self, config: dict[str, Any]) -> None:
        import wandb

        try:
            if self.mode == "online":
                _ask(wandb.setup().settings.base_url)
            self._run = self._init(self.mode)
        except Exception as error:  # no key, no server, a key that is refused
            if self.mode == "offline":
                raise
            _say(f"cannot log online ({one_line(error)}); logging offline")
            wandb.teardown()  # or the run's id stays in use
            self.mode = "offline"
            self._run = self._init(self.mode)
        self._run.config.update(config, allow_val_change=True)  # a requeued job may be on another node
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _init(self, mode: Any) -> Any:
        import wandb

        settings = {
            "silent": True,
            "console": "off",
            "init_timeout": START_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
        }
        known = {name: value for name, value in settings.items() if name in wandb.Settings.model_fields}
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatron-lowbit"),
            id=self.run_id,
            resume="allow",
            name=f"{self.stage} {self.folder.name}",
            job_type=self.stage,
            mode=mode,
            dir=str(self.folder),
            settings=wandb.Settings(**known),
        )

    def _last_step(self) -> int:
        """Return the newest step that the run's files of other processes hold or, online, that the server has; else
        -1."""
        pattern = "offline-run-*" if self.mode == "online" else "*run-*"
        own = Path(self._run.settings.sync_file).absolute()
        files = self.folder.glob(f"wandb/{pattern}-{self.run_id}/run-{self.run_id}.wandb")
        last = [last_step(file) for file in files if file != own and not file.parent.is_symlink()]
        if self.mode == "online":
            last.append(int(self._run.summary.get("step", -1)))
        return max(last, default=-1)

    def _log(self, record: dict[str, Any]) -> None:
        import wandb

        step = record["step"]
        if "table" in record:
            table = wandb.Table(columns=record["columns"], data=record["rows"])
            values = {record["table"]: table}
            if "plot" in record:
                values[f"{record['table']}/plot"] = _plot(wandb.plot, table, record)
        else:
            values = {key: value for key, value in record.items() if key not in ("stage", "run", "step", "time")}
        self._run.log({**values, "step": step}, step=step)
        self._step = step

    def _artifact(self, name: str, kind: str, files: Sequence[Path], metadata: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(name, kind, metadata=metadata)
        for file in files:
            artifact.add_reference(file.as_uri(), name=file.name, checksum=file.suffix == ".json")
        self._run.log_artifact(artifact)

    def _page(self, file: Path) -> None:
        import wandb

        # With inject=True wandb would add a style sheet from the network.
        self._run.log({"report": wandb.Html(str(file), inject=False)}, step=self._step)

    def _finish(self, exit_code: int) -> None:
        if exit_code == 99:  # the scheduler will start it again
            self._run.mark_preempting()
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            _say(f"not all is uploaded; {self._sync_line()}")
        else:
            if self.mode == "offline":
                _say(f"logged offline; {self._sync_line()}")

    def _sync_line(self) -> str:
        folder = shlex.quote(str(self.folder / "wandb"))
        which = f"--include-online {folder}/*run" if self.mode == "online" else f"{folder}/offline-run"
        return f"to upload it: wandb sync {which}-*-{self.run_id}"


def _plot(plot: Any, table: Any, record: dict[str, Any]) -> Any:
    """Return W&B's own chart of a table: lines over epochs, one per group, or a bar per layer."""
    x, y, *stroke = record["plot"]
    if stroke:
        return plot.line(table, x, y, stroke=stroke[0], title=f"{record['table']}: {y}")
    return plot.bar(table, x, y, title=f"{record['table']}: {y}")


def _ask(server: str) -> None:
    """Raise OSError where nobody answers; whatever the answer is, wandb shall judge it."""
    try:
        urllib.request.urlopen(f"{server}/graphql", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        why = getattr(error, "reason", error)
        if not isinstance(why, ssl.SSLError):  # wandb may know other certificates
            raise OSError(f"{server}/graphql: {why}") from None


def _say(what: str) -> None:
    print(f"W&B: {what}", file=sys.stderr, flush=True)


def last_step(file: Path) -> int:
    """Return the largest `step` in the history of a .wandb file, which may end in the middle of a record; -1 for
    none."""
    from wandb.proto import wandb_internal_pb2 as protobuf

    last = -1
    with contextlib.suppress(OSError):
        for payload in _payloads(file.read_bytes()):
            record = protobuf.Record.FromString(payload)  # type: ignore[attr-defined]
            for item in record.history.item if record.WhichOneof("record_type") == "history" else ():
                if "step" in (item.key, *item.nested_key):
                    last = max(last, int(item.value_json))
    return last


def _payloads(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log, as far as they are whole: fragments `crc, length, kind` in blocks of 32 KiB."""
    position, payload = _HEADER, b""
    while position + _FRAGMENT.size <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _FRAGMENT.size:
            position += room
            continue
        checksum, length, kind = _FRAGMENT.unpack_from(data, position)
        fragment = data[position + _FRAGMENT.size : position + _FRAGMENT.size + length]
        if kind == 0:
            position += room
            continue
        if len(fragment) < length or zlib.crc32(bytes([kind]) + fragment) != checksum:
            return
        position += _FRAGMENT.size + length
        payload = fragment if kind in (1, 2) else payload + fragment  # full, first, middle, last
        if kind in (1, 4):
            yield payload
