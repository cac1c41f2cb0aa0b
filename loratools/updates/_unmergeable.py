"""What PEFT trains that is no change of weights, by `peft_type`, and why."""

from __future__ import annotations

REASONS: dict[str, str] = {}
