"""`python -m statekv_ros.demo`."""
import sys

from statekv_ros.demo import main

sys.exit(main())
