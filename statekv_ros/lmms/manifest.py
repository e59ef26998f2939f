"""What lmms-eval finds in the entry-point group `lmms_eval.models`."""
from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest('statekv', chat_class_path='statekv_ros.lmms.model.StateKV')
