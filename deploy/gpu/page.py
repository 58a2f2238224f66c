"""results.jsonl -> page.md: the last run of each piece, as tables."""

from collections.abc import Iterable, Mapping
from typing import Any

Rows = list[dict[str, Any]]


def last_runs(rows: Iterable[dict[str, Any]]) -> dict[str, Rows]:
    """The rows of each piece from its last start on, in the order in which the pieces first started."""
    found: dict[str, Rows] = {}
    for row in rows:
        if row.get("state") == "started":
            found[row["piece"]] = []
        found.setdefault(row["piece"], []).append(row)
    return found


def state(rows: Rows) -> str:
    """Of one piece: passed, failed, beyond its limit, not started, or cut off while it ran."""
    states = [row["state"] for row in rows if "state" in row]
    return "cut off" if not states or states[-1] == "started" else states[-1]


def page(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: the machine, a line a piece, and what each measured."""
    runs = last_runs(rows)
    machine = {k: v for row in runs.pop("machine", []) for k, v in row.items() if k not in ("piece", "state")}
    lines = ["# jest on a GPU", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += _table(("piece", "state", "seconds"), ((p, state(r), r[-1].get("seconds", "")) for p, r in runs.items()))
    for piece, found in runs.items():
        lines += ["", f"## {piece}: {state(found)}", ""]
        measured = [row for row in found if "state" not in row and "error" not in row]
        lines += _table(("measurement", "values"), ((row["what"], _values(row)) for row in measured))
        for row in found:
            if text := row.get("error"):
                lines += ["", row.get("what", piece), "", "```text", *text.rstrip().splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _values(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {_shown(v)}" for k, v in row.items() if k not in ("piece", "what"))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: tuple[str, ...], body: Iterable[tuple[Any, ...]]) -> list[str]:
    cells = [head, ("---",) * len(head), *body]
    return ["| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in cells]
