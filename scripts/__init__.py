"""For `python -m scripts.train`: the scripts find what lies beside them, as when run by path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
