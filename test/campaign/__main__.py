"""`python test/campaign CLASS ...`."""
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])     # as pytest does: `campaign` and `live` are found beside each other

from campaign.cli import main  # noqa: E402

if __name__ == '__main__':      # spawned workers import this file under another name
    sys.exit(main())
