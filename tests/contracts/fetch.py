# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Brings transformers' own common tests, of the release that is installed, into a folder to put on PYTHONPATH."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

# The source distribution holds the common tests alone. Of what they import beside them, only these names are used: no
# model's tests here export graphs, read images, or know the generation of transformers.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": """config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
""",
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
    "src/transformers/__init__.py": "",
    "tests/fixtures/sample_text.txt": "The cat sat on the mat.\n\nDer Hund und die Katze.\n",
}


def fetch(folder: Path) -> None:
    """Downloads the tests, and what they need beside the package's own requirements, unless they are there."""
    if (folder / "done").is_file() and (folder / "done").read_text() == transformers.__version__:
        return
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target", folder, "parameterized"], check=True)
    with tempfile.TemporaryDirectory() as download:
        source = f"transformers=={transformers.__version__}"
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary", "transformers", "--dest", download, source], check=True
        )
        (archive,) = Path(download).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            for member in files:
                member.name = member.name.partition("/")[2]
                if member.isfile() and member.name.startswith("tests/"):
                    files.extract(member, folder, filter="data")
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "done").write_text(transformers.__version__)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
