"""Whether a run that is resumed meets the data that it had."""

from collections.abc import Mapping, Sequence
from typing import Any

from phase5_training.errors import printable

SHOWN = 3  # files that are named
_KEYS = ("samples", "input_shape", "input_kind", "target_kind", "target_shape", "num_classes", "vocab_size")


def changed_data(events: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> str:
    """What is different about the data since the last session of a run; empty for nothing.

    Args:
        events: of the run; those of its sessions hold the data as they were.
        now: the data of each split, as its loader describes them.

    Example:
        >>> then = [{"event": "session", "data": {"train": {"samples": 70}}}]
        >>> changed_data(then, {"train": {"samples": 71}})
        'train has 71 samples and had 70'
        >>> changed_data(then, {"train": {"samples": 70}})
        ''
    """
    sessions = [event for event in events if event.get("event") == "session"]
    then = sessions[-1].get("data", {}) if sessions else {}
    found = [
        f"{split} {', '.join(said)}"
        for split in now
        if split in then and (said := differences(then[split], now[split]))
    ]
    return "; ".join(found)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is different about one split, in words; a file that was only copied or touched is the same."""
    found = [
        f"has {_figure(now[key])} {key.replace('_', ' ')} and had {_figure(then[key])}"
        for key in _KEYS
        if key in then and key in now and then[key] != now[key]
    ]
    before, after = then.get("content"), now.get("content")
    if before and after and before["digest"] != after["digest"]:
        found.append(_files(before, after))
    return found


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _files(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which files are new, gone or different."""
    old = {file["path"]: file for file in then["files"]}
    new = {file["path"]: file for file in now["files"]}
    contents = [sorted(file["hash"] for file in part) for part in (old.values(), new.values())]
    if contents[0] == contents[1] and then["count"] == now["count"] == len(new):
        return f"reads its {now['count']} files in another order"
    said = []
    if then["count"] == len(old) and now["count"] == len(new):
        said = [f"has lost {path}" for path in old if path not in new]
        said += [f"has the new {path}" for path in new if path not in old]
    for path in sorted(old.keys() & new.keys()):
        a, b = old[path], new[path]
        if a["bytes"] != b["bytes"]:
            said.append(f"reads {path} of {b['bytes']:,} bytes and not {a['bytes']:,}")
        elif a["hash"] != b["hash"]:
            said.append(f"reads {path} of the same size with other content")
    if not said:
        return f"reads {now['count']} files, not all the same as the {then['count']} it had"
    more = [f"{len(said) - SHOWN} more files differ"] if len(said) > SHOWN else []
    return printable(", ".join([*said[:SHOWN], *more]))
