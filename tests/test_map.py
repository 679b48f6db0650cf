# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""docs/map.md points at what it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_links_point_at_what_they_name():
    page = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`(\w+)`\]\(\.\./([^)#]+)#L(\d+)\)", page)
    assert len(links) == page.count("#L")
    wrong = []
    for name, path, line in links:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        right = [i for i, text in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
        if int(line) not in right:
            wrong.append(f"{path}#L{line}: `{name}` is in lines {right}")
    assert not wrong, wrong
