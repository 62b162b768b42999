"""The example is a folder of scripts, not a package: its tests import from it as its scripts do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "unicode_facts"))
