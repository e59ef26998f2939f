"""Pictures of what the cameras saw: made beside the frame steps, kept with them, shown to who asks."""
from statekv_ros.node.pictures.album import Album
from statekv_ros.node.pictures.darkroom import Darkroom

__all__ = ['Album', 'Darkroom']
