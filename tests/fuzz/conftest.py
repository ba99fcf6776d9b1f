"""The harness is a script as well: its folder is on the path, as it is when it runs by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
