"""What differs between model families, in one table; nothing else in the project asks for a family by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes:
        name: as its makers write it.
        shares_prefix: whether several questions can stand in one sequence behind their image: the model takes a mask of
            ``[rows, 1, length, length]`` and positions of one's own. `tests/test_shared_prefix.py` proves those that say so.
        why_not: why it does not, in a few words.
    """

    name: str
    shares_prefix: bool
    why_not: str = ""


#: By ``model_type`` of the configuration.
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", True),
    "qwen2_5_vl": Family("Qwen2.5-VL", True),
    "qwen3_vl": Family("Qwen3-VL", True),
}


def of(config) -> Family:
    """The family of a model's configuration; one that nothing is known of trains separate rows."""
    kind = config.model_type
    return FAMILIES.get(kind) or Family(kind, False, "no test has shown that it takes this mask and these positions")
