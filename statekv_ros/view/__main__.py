"""`python -m statekv_ros.view`."""
import sys

from statekv_ros.view.cli import main

sys.exit(main())
