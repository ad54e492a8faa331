"""Fields of a chat completion that some models behind an OpenAI-compatible API do not take, and what to send in their place.

OpenAI's reasoning models refuse ``max_tokens`` (they want ``max_completion_tokens``) and any temperature but their own. They say
so with status 400, the field's name in ``param`` and a ``code`` that begins with ``unsupported``; the next request goes without.
Source: OpenAI's API reference, "Create chat completion" and "Error codes".
"""

from __future__ import annotations

from collections.abc import Mapping

from sonovqa import cli

#: Field -> the one to send in its place, or ``None`` for none.
INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": None}


class Dialect:
    """What one endpoint's model was found to refuse.

    Attributes:
        refused: fields of `INSTEAD` that are no longer sent.
    """

    def __init__(self):
        self.refused: set[str] = set()

    def spoken(self, request: Mapping) -> dict:
        """The request without the refused fields, their values under the other name where there is one."""
        made = {name: value for name, value in request.items() if name not in self.refused}
        others = {INSTEAD[name]: request[name] for name in self.refused & request.keys() if INSTEAD[name]}
        return made | others

    def learns(self, fault: Exception, request: Mapping) -> bool:
        """Whether a fault is of a field of the request that can be done without; it is left out from now on."""
        field = getattr(fault, "param", None)
        code = str(getattr(fault, "code", None) or "")
        if getattr(fault, "status_code", None) != 400 or field not in INSTEAD or not code.startswith("unsupported"):
            return False
        if field == "temperature" and field not in self.refused:
            cli.stderr.print(
                "the endpoint's model takes no temperature: its answers are not greedy and may differ when asked again"
            )
        self.refused.add(field)
        return field in request
