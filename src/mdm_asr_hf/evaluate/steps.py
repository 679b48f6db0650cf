# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""How a text came about, step by step: read of an output of `generate`, and laid out to be drawn in a browser."""

from pathlib import Path
from typing import Any

from ..generation_configuration_mdm_asr import BRANCHES
from ..transcribe.transcript import text_length, token_texts

# What draws a decoding, and how it looks; colours and whatever is around it are the page's own.
SCRIPT, STYLE = (Path(__file__).with_name(f"steps.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
# What stands for the end of text.
_END = "[END]"


def read_steps(output: Any, row: int, tokenizer: Any, eos_token_id: int) -> dict[str, Any]:
    """
    What a row of an output of `generate` says of its steps: "nfe", "tokens" and "end" (text, confidence, step and,
    with drafts, branch), and with drafts "accepted_drafts", "rejected_drafts" (branch -> number) and "struck_drafts"
    ("place" among the tokens, "branch", "text").
    """
    ids, confidences = output.sequences[row].tolist(), output.confidence[row].tolist()
    steps = output.commit_steps[row].tolist()
    length, has_end = text_length(ids, confidences, steps, eos_token_id)
    # A row in which nobody speaks has an end, which no token's probability says anything about.
    has_end = has_end and confidences[length] > 0
    pieces = token_texts(tokenizer, ids[:length])
    if has_end:
        pieces.append(tokenizer.decode(ids[length : length + 1], skip_special_tokens=False))
    tokens = [
        {"text": text, "confidence": round(confidence, 4), "step": step}
        for text, confidence, step in zip(pieces, confidences, steps, strict=False)
    ]
    result = {"nfe": int(output.nfe[row]), "tokens": tokens[:length], "end": tokens[length] if has_end else None}
    if output.token_branches is None:
        return result
    for token, branch in zip(tokens, output.token_branches[row].tolist(), strict=False):
        token["branch"] = BRANCHES[branch - 1] if branch else None
    for name in ("accepted_drafts", "rejected_drafts"):
        result[name] = dict(zip(BRANCHES, getattr(output, name)[row].tolist(), strict=True))
    # Those of a text that was taken for silence have no text to stand in.
    struck = output.struck_drafts[row] if tokens else []
    result["struck_drafts"] = [
        {"place": place, "branch": BRANCHES[branch], "text": tokenizer.decode(its_ids, skip_special_tokens=False)}
        for place, branch, its_ids in struck
    ]
    return result


def lay_out(row: dict[str, Any]) -> dict[str, Any] | None:
    """
    The steps of a row. Of a canvas its tokens as [text, confidence, step]; of drafts, in the order of the text, its
    "items": [text, step, branch, confidence] of tokens, the end of text included, and [text, step, branch] of struck
    drafts. None where no steps were recorded.
    """
    tokens = row.get("tokens") or []
    if not tokens or any(token.get("step") is None for token in tokens):
        return None
    if "struck_drafts" not in row:
        # The end of text is not among the tokens, and may have been committed in a later step.
        steps = max(row.get("nfe") or 0, *(token["step"] for token in tokens))
        return {
            "steps": steps,
            "tokens": [[token["text"], token.get("confidence"), token["step"]] for token in tokens],
        }
    end = row.get("end")
    tokens = [*tokens, *([end] if end else [])]
    # Evaluations of an earlier text that was refused are not among these.
    steps = max(token["step"] for token in tokens)
    items: list[list[Any]] = []

    def written(text: str) -> str:
        return text.replace(end["text"], _END) if end else text

    for place in range(len(tokens) + 1):
        # What was struck stood where the same evaluation committed the donor's own token.
        step = tokens[place]["step"] if place < len(tokens) else steps
        for struck in row["struck_drafts"]:
            if struck["place"] == place:
                items.append([written(struck["text"]), step, struck["branch"]])
        if place < len(tokens):
            token = tokens[place]
            items.append([written(token["text"]), step, token["branch"], token["confidence"]])
    return {"steps": steps, "items": items}
