"""Prints the lower bounds of what is installed with fino-fast, and of its extras for users, as
constraints for pip.
"""

import re
import tomllib
from pathlib import Path

TOOLS = {"test", "lint", "bench", "bench-gpu"}  # of developers: their bounds are not promises

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
users = [extras[name] for name in extras.keys() - TOOLS]
for requirement in sorted({*project["dependencies"], *(one for extra in users for one in extra)}):
    if bound := re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
