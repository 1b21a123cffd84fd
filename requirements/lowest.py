"""Prints the lower bounds of what is installed with fino-fast, and of its extras for users, as
constraints for pip; of several for one package the highest.
"""

import re
import tomllib
from pathlib import Path

TOOLS = {"test", "lint", "bench", "bench-gpu"}  # of developers: their bounds are not promises

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
users = [extras[name] for name in extras.keys() - TOOLS]
lowest: dict[str, list[int]] = {}
for requirement in [*project["dependencies"], *(one for extra in users for one in extra)]:
    if bound := re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement):
        version = [int(part) for part in bound[2].split(".")]
        lowest[bound[1]] = max(version, lowest.get(bound[1], version))
for name in sorted(lowest):
    print(f"{name}=={'.'.join(map(str, lowest[name]))}")
