"""Host tests run on T5X where it is importable, else on the embedded host."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
