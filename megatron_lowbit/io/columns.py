"""Choose the column of records that holds their text.

In this order: the column that is asked for; one with a name that text goes by (`text`, `content`, ...); conversations
(`messages`, `conversations`), or a prompt and its answer in two columns, both by the tokenizer's chat template; else
the column of strings that holds most characters, unless its name says that it is no text (`id`, `url`, `title`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lowbit.config import LowBitError, shown

_TEXT = (
    *("text", "content", "document", "article", "body", "passage", "story", "sentence", "code", "raw_content"),
    *("page_content", "full_text", "context", "transcript", "abstract", "review", "markdown"),
)
_CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_PROMPTS = ("prompt", "instruction", "question", "query")
_ANSWERS = ("completion", "output", "response", "answer", "chosen")
_SYSTEM = ("system", "system_prompt")
_NO_TEXT = {
    *("id", "_id", "uuid", "guid", "url", "uri", "link", "source", "path", "file", "filename", "hash", "sha", "md5"),
    *("title", "name", "author", "user", "lang", "language", "label", "labels", "tag", "tags", "category", "topic"),
    *("date", "time", "timestamp", "created", "updated", "license", "split", "type", "kind", "domain", "dataset"),
    *("version", "key", "index", "idx", "meta", "metadata", "subject", "level", "status", "model"),
}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Column:
    """name: of a column, or of several joined by +; pair: the columns of a prompt and of its answer."""

    name: str
    is_chat: bool = False
    pair: tuple[str, str] | None = None

    def text(self, row: dict[str, Any], tokenizer: Any) -> str | None:
        """Return the row's text, conversations as the chat template writes them; None where there is none."""
        if not self.is_chat:
            value = _value(row, self.name)
            return value if isinstance(value, str) else None
        messages = _messages(_value(row, self.name)) if self.pair is None else _of_pair(row, *self.pair)
        return tokenizer.apply_chat_template(messages, tokenize=False) if messages else None


def enough_rows(rows: Sequence[dict[str, Any]], wanted: str | None) -> bool:
    """Return whether these rows are enough to choose by: no column that would be preferred is null in all of them."""
    names = list(rows[0])
    preferred = [wanted] if wanted is not None else _named(names, _TEXT) or _named(names, _CHATS)
    if preferred:
        return any(_value(row, preferred[0]) is not None for row in rows)
    return _pair(rows) is not None or _longest(rows) is not None


def choose_column(rows: Sequence[dict[str, Any]], wanted: str | None, source: str, key: str) -> Column:
    """Choose the column of the source's first rows to read. Raises LowBitError where there is none, or `wanted` is no
    text."""
    names = list(rows[0]) if rows else []
    listed = ", ".join(names) if rows else "no rows"
    if wanted is not None:
        values = [value for row in rows if (value := _value(row, wanted)) is not None]
        if not values and wanted.partition(".")[0] not in names:
            raise LowBitError(f"{key}.text_column={wanted!r} is no column of {source!r}; choose one of {listed}")
        if values and _messages(values[0]):
            return Column(wanted, True)
        if values and not isinstance(values[0], str):
            raise LowBitError(f"{key}.text_column={wanted!r} of {source!r} holds {shown(values[0])[:60]}, no text")
        return Column(wanted)
    named = column_by_name(rows)
    if named is not None:
        return named
    longest = _longest(rows)
    if longest is None:
        raise LowBitError(
            f"{key}.data={source!r} has no text column (columns: {listed}); choose one with {key}.text_column"
        )
    return Column(longest)


def column_by_name(rows: Sequence[dict[str, Any]]) -> Column | None:
    """Return the column, or the pair of columns, that its name and its values speak for."""
    names = list(rows[0]) if rows else []
    for name in _named(names, _TEXT):
        if any(isinstance(row[name], str) for row in rows):
            return Column(name)
    for name in _named(names, _CHATS):
        if any(_messages(row[name]) for row in rows):
            return Column(name, True)
    pair = _pair(rows)
    return None if pair is None else Column("+".join(pair), True, pair)


def records_inside(row: dict[str, Any]) -> tuple[str, list[dict[str, Any]]] | None:
    """Return (name, records) of the list that one object wraps, as {"version": ..., "data": [...]} does; else None."""
    if column_by_name([row]) is not None:
        return None
    lists = {name: [item for item in value if item] for name, value in row.items() if isinstance(value, list)}
    lists = {name: items for name, items in lists.items() if items and isinstance(items[0], dict | str)}
    if len(lists) != 1:
        return None
    ((name, items),) = lists.items()
    beside = _longest([row])
    if beside is not None and len(row[beside]) > len(str(items)):
        return None  # a record of text with a list of, say, tags
    return name, [item if isinstance(item, dict) else {name: item} for item in items]


def _named(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return those of the names that are known, the best known first."""
    lower = {name.lower(): name for name in reversed(names)}
    return [lower[name] for name in known if name in lower]


def _longest(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the column of strings with most characters."""
    sizes = (
        {
            name: sum(len(row[name]) for row in rows if isinstance(row.get(name), str))
            for name in rows[0]
            if name.lower() not in _NO_TEXT and not name.lower().endswith(("_id", "_url", "_path", "_name"))
        }
        if rows
        else {}
    )
    longest = max(sizes, key=sizes.__getitem__, default=None)
    return longest if longest is not None and sizes[longest] else None


def _pair(rows: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """Return (column of prompts, column of answers), where both are there."""
    names = list(rows[0]) if rows else []
    prompts, answers = _named(names, _PROMPTS), _named(names, _ANSWERS)
    if not prompts or not answers:
        return None
    pair = prompts[0], answers[0]
    return pair if any(_of_pair(row, *pair) for row in rows) else None


def _value(row: dict[str, Any], name: str) -> Any:
    """Return the value of a column, or of a field inside one (translation.en); None where it is not there."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _of_pair(row: dict[str, Any], prompt: str, answer: str) -> list[dict[str, Any]]:
    """Return the messages of a prompt (with its further input and the system's words) and its answer; none without
    both."""
    asked, answered = row[prompt], row[answer]
    before, after = _messages(asked), _messages(answered)
    if before and after:
        return before + after
    if not isinstance(asked, str) or not isinstance(answered, str) or not asked.strip() or not answered.strip():
        return []
    further = row.get("input")
    if isinstance(further, str) and further.strip():
        asked = f"{asked}\n\n{further}"
    system = next((row[name] for name in _named(list(row), _SYSTEM) if isinstance(row[name], str) and row[name]), None)
    words = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [{"role": "system", "content": system}, *words] if system else words


def _messages(value: Any) -> list[dict[str, Any]]:
    """Return [{role, content}, ...] of a list with role and content, or from and value, in each; [] of anything
    else."""
    if isinstance(value, dict) and value and all(isinstance(items, list) for items in value.values()):
        value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        return []
    messages = []
    for item in value:
        if not isinstance(item, dict):
            return []
        role = item.get("role") or item.get("from")
        content = item["content"] if item.get("content") is not None else item.get("value")
        if not isinstance(role, str) or content is None:
            return []
        messages.append({"role": _ROLES.get(role.lower(), role), "content": content})
    return messages
