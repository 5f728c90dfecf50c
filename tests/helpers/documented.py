"""The commands of docs/scale.md."""

import re
from pathlib import Path

import visibench

PAGE = (Path(visibench.__file__).parent / "docs" / "scale.md").read_text()
SCRIPTS = re.findall(r"^```bash\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL)
