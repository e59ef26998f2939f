"""`python -m statekv_ros.backbones.tiny FOLDER`."""
from statekv_ros.backbones.tiny import main

main()
