"""`DataSpec`: what the data are, as a model and a loss need to know it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from phase5_training.errors import UsageError, nearest_match

InputKind = Literal["features", "tokens"]
InputChoice = Literal["auto", "features", "tokens"]
TargetKind = Literal["class", "tokens", "float", "multi"]
TASKS = ("classification", "regression", "next_token", "multi_task")
IGNORED_LABEL = -100  # cross entropy leaves these positions out
MAX_CLASSES = 1 << 20  # of one target; a label beyond is a quantity or an accident
MAX_VOCABULARY = 1 << 24  # token ids that no file declares


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """One named target. ``label_range``: the smallest and largest label that occur."""

    kind: TargetKind
    shape: tuple[int | None, ...] = ()
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    label_range: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What one sample looks like. Shapes leave out the batch; None is a length that varies.

    ``num_classes`` counts the classes of a "class" target, or the ids of a per-position "tokens"
    target. ``vocab_size`` is what the tokenizer or the file declares, else the largest token plus one.
    ``targets`` describes each target of a "multi" data set.
    """

    task: str
    input_kind: InputKind
    input_shape: tuple[int | None, ...]
    input_dtype: str
    target_kind: TargetKind
    target_shape: tuple[int | None, ...] = ()
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    label_range: tuple[int, int] | None = None
    vocab_size: int | None = None
    max_token: int | None = None
    targets: dict[str, TargetSpec] = field(default_factory=dict)
    ragged: bool = False
    pad_id: int = 0
    max_length: int | None = None
    tokenizer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; long lists of class names are cut to their first 100."""
        fields = asdict(self)
        if self.class_names is not None:
            fields["class_names"] = list(self.class_names[:100])
        return fields


def check_input_kind(reads: InputKind, kind: InputKind, *, text: bool) -> None:
    """Refuse inputs of another kind than a model by name reads.

    Args:
        reads: what the model reads.
        kind: what the inputs are.
        text: whether they were text before they were tokens.

    Raises:
        UsageError: names the remedy.
    """
    if kind == reads:
        return
    if reads == "tokens":
        raise UsageError("the model reads token ids and the inputs are features; use model='mlp'")
    if text:
        raise UsageError("the mlp reads features and the inputs are text; use model='decoder'")
    raise UsageError(
        "the mlp reads features and lists of whole numbers are read as token ids; set input_kind='features' "
        "where they are quantities, or use model='decoder'"
    )


def normalize_task(task: str | None) -> str | None:
    """The task's name as we spell it, or None for "infer it".

    Example:
        >>> normalize_task("next-token")
        'next_token'
    """
    if task is None or task == "auto":
        return None
    name = task.lower().replace("-", "_")
    if name in TASKS:
        return name
    near = nearest_match(task, TASKS)
    hint = f"; did you mean {near!r}?" if near else ""
    raise UsageError(f"task={task!r} is unknown; wanted one of {', '.join(TASKS)}{hint}")
