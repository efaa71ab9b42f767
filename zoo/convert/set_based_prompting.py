"""Set-based prompting's mask and positions (reidmcy/set-based-prompting) against its parity cases."""

from __future__ import annotations

from torch import Tensor

from zoo.convert.parity import Case
from zoo.generate.prompts import set_prompt


def replay(case: Case) -> dict[str, Tensor]:
    """Visibility and positions of prefix, parallel segments and suffix."""
    prefix, *segments, suffix = case.inputs["lengths"].tolist()
    seen, position = set_prompt(prefix, segments, suffix)
    return {"mask": seen.float(), "position_ids_nopad": position[None]}
