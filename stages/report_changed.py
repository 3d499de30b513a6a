"""What the report shows of the examples that changed most: pictures, texts and answers."""

import base64
import io
import json
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.image import imsave

from quantifind.certification import digits


def examples(changed: pd.DataFrame) -> list[dict[str, Any]]:
    """Cards, as plain values.

    changed: the table of `stages.changed.changed_table`, as it was read.
    """
    return [_card(row) for row in changed.to_dict("records")]


def note(changed: pd.DataFrame) -> str:
    """Which examples the cards are.

    changed: as `examples` takes it.
    """
    answers = changed[["was", "became"]].dropna()
    if len(answers) and (answers["was"] == answers["became"]).all():
        return "No answer changed: these are the test examples with the largest changes of loss."
    others = "other answers first, then " if len(answers) else ""
    return f"The test examples that changed most: {others}the largest changes of loss."


def _card(row: dict[Any, Any]) -> dict[str, Any]:
    was, became, target = (_class(row[key]) for key in ("was", "became", "target"))
    flipped = was is not None and became is not None and was != became
    verdict = ""
    if flipped:
        kinds = {was: "right to wrong", became: "wrong to right"}
        verdict = kinds.get(target, "wrong to wrong") if target is not None else "changed"
    words = f"answer {was} → {became}" if flipped else ("" if was is None else f"answer {was}")
    loss = " → ".join(digits.number(row[key], 3) for key in ("original_loss", "loss"))
    return {
        "number": digits.number(row["example"]),
        "picture": _picture(row) if row["kind"] == "picture" else None,
        "text": json.loads(row["input"]) if row["kind"] in ("text", "numbers") else None,
        "answer": words,
        "target": "" if target is None else f"truth {target}",
        "verdict": verdict,
        "loss": f"loss {loss}",
    }


def _class(value: Any) -> str | None:
    return f"{int(value)}" if digits.is_number(value) else None


def _picture(row: dict[Any, Any]) -> str:
    """A PNG in base64."""
    shape = [int(size) for size in row["shape"].split("x")]
    raw = np.frombuffer(base64.b64decode(row["input"]), dtype=np.uint8).reshape(shape)
    pixels = np.repeat(raw, 3, axis=2) if shape[2] == 1 else raw
    kept = io.BytesIO()
    # no name of a version: the same page from the same tables
    written_by: Any = {"Software": None}
    imsave(kept, pixels, format="png", metadata=written_by)
    return base64.b64encode(kept.getvalue()).decode()
