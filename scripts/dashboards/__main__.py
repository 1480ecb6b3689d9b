"""Write all that follows from the metric catalogue.

python -m scripts.dashboards [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.dashboards.files import ROOT, generated_files


def main() -> None:
    """Write every file below the given folder, or below the checkout."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for path, text in generated_files().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
